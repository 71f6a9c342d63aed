"""New keys and values into their slots of the paged cache, both in one launch; and the copies that a graph replay
needs.
"""

import triton
import triton.language as tl


@triton.jit
def stored(x, scale, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """What the cache stores of x: x / scale, saturated, in an fp8 cache (LIMIT is its largest number); else x."""
    if LIMIT > 0:
        x = tl.div_rn(x.to(tl.float32), scale)
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def write_one(
    SOURCE, POOL, tokens, live, page, place, scale, source_token, source_head, D: tl.constexpr, PADDED: tl.constexpr,
    HKV: tl.constexpr, HEADS: tl.constexpr, POOL_PAGE: tl.constexpr, POOL_TOKEN: tl.constexpr,
    POOL_HEAD: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Rows of all heads of ``tokens`` to (page, place) of the pool."""
    h = tl.arange(0, HEADS)
    c = tl.arange(0, PADDED)
    keep = live[:, None, None] & (h < HKV)[None, :, None] & (c < D)[None, None, :]
    source = (tokens.to(tl.int64) * source_token)[:, None, None] + (h * source_head)[None, :, None] + c[None, None, :]
    x = tl.load(SOURCE + source, mask=keep)
    at = (page * POOL_PAGE + place * POOL_TOKEN)[:, None, None] + (h * POOL_HEAD)[None, :, None] + c[None, None, :]
    tl.store(POOL + at, stored(x, scale, LIMIT, POOL.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["count", "k_scale", "v_scale", "k_token", "k_head", "v_token", "v_head"])
def write_kernel(
    K,
    V,
    SLOTS,
    K_POOL,
    V_POOL,
    count,
    k_scale,
    v_scale,
    k_token,
    k_head,
    v_token,
    v_head,
    TOKENS: tl.constexpr,
    HKV: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    V_PADDED: tl.constexpr,
    HAS_V: tl.constexpr,
    PAGE: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_TOKEN: tl.constexpr,
    V_HEAD: tl.constexpr,
    LIMIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (count / TOKENS). A slot of -1 is not written. ALIGNED: the strides of K and V are multiples of 16."""
    if ALIGNED:  # said so that the compiler sees it
        k_token = k_token // 16 * 16
        k_head = k_head // 16 * 16
        v_token = v_token // 16 * 16
        v_head = v_head // 16 * 16
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(SLOTS + tokens, mask=tokens < count, other=-1)
    live = slot >= 0
    page = slot // PAGE
    place = slot % PAGE
    write_one(
        K, K_POOL, tokens, live, page, place, k_scale, k_token, k_head, D, D_PADDED, HKV, HEADS, K_PAGE, K_TOKEN,
        K_HEAD, LIMIT
    )  # fmt: skip
    if HAS_V:
        write_one(
            V, V_POOL, tokens, live, page, place, v_scale, v_token, v_head, DV, V_PADDED, HKV, HEADS, V_PAGE, V_TOKEN,
            V_HEAD, LIMIT
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def copy_pages(LENGTHS_FROM, LENGTHS_TO, FROM, TO, b, from_stride, to_stride, PAGE: tl.constexpr, CHUNK: tl.constexpr):
    """A request's length, and the page ids that it needs."""
    length = tl.load(LENGTHS_FROM + b)
    tl.store(LENGTHS_TO + b, length)
    pages = (length + PAGE - 1) // PAGE
    for i in range(0, pages, CHUNK):
        at = i + tl.arange(0, CHUNK)
        ids = tl.load(FROM + b.to(tl.int64) * from_stride + at, mask=at < pages)
        tl.store(TO + b.to(tl.int64) * to_stride + at, ids, mask=at < pages)


@triton.jit
def tree_row(TREE_FROM, TREE_TO, DEPTHS, row, q, Q_PADDED: tl.constexpr, COPY: tl.constexpr):
    """One draft token's row of the tree, copied if COPY, and the number of its ancestors."""
    c = tl.arange(0, Q_PADDED)
    bits = tl.load(TREE_FROM + row.to(tl.int64) * q + c, mask=c < q, other=0)
    if COPY:
        tl.store(TREE_TO + row.to(tl.int64) * q + c, bits, mask=c < q)
    tl.store(DEPTHS + row, tl.sum((bits != 0).to(tl.int32), 0) - 1)


@triton.jit(do_not_specialize=["q"])
def tree_depth_kernel(TREE_MASK, DEPTHS, q, Q_PADDED: tl.constexpr):
    """DEPTHS [B, q]: how many ancestors each draft token has. Grid (B * q)."""
    tree_row(TREE_MASK, TREE_MASK, DEPTHS, tl.program_id(0), q, Q_PADDED, False)


@triton.jit(do_not_specialize=["batch", "tokens", "pages_from", "pages_to", "encoder_from", "encoder_to"])
def refresh_kernel(
    LENGTHS_FROM,
    LENGTHS_TO,
    STARTS_FROM,
    STARTS_TO,
    PAGES_FROM,
    PAGES_TO,
    SLOTS_FROM,
    SLOTS_TO,
    TREE_FROM,
    TREE_TO,
    DEPTHS,
    ENCODER_LENGTHS_FROM,
    ENCODER_LENGTHS_TO,
    ENCODER_PAGES_FROM,
    ENCODER_PAGES_TO,
    batch,
    tokens,
    pages_from,
    pages_to,
    encoder_from,
    encoder_to,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    TREE: tl.constexpr,
    Q_TREE: tl.constexpr,
    Q_PADDED: tl.constexpr,
    ENCODER: tl.constexpr,
):
    """A batch into the buffers of a captured graph, in one launch. Grid (batch): it does not grow with the context."""
    b = tl.program_id(0)
    tl.store(STARTS_TO + b, tl.load(STARTS_FROM + b))
    if b == batch - 1:
        tl.store(STARTS_TO + batch, tl.load(STARTS_FROM + batch))
    copy_pages(LENGTHS_FROM, LENGTHS_TO, PAGES_FROM, PAGES_TO, b, pages_from, pages_to, PAGE, CHUNK)
    share = (tokens + batch - 1) // batch
    for i in range(0, share, CHUNK):
        place = i + tl.arange(0, CHUNK)
        at = b * share + place
        mine = (place < share) & (at < tokens)
        tl.store(SLOTS_TO + at, tl.load(SLOTS_FROM + at, mask=mine), mask=mine)
    if TREE:
        for i in range(Q_TREE):
            tree_row(TREE_FROM, TREE_TO, DEPTHS, b * Q_TREE + i, Q_TREE, Q_PADDED, True)
    if ENCODER:
        copy_pages(
            ENCODER_LENGTHS_FROM, ENCODER_LENGTHS_TO, ENCODER_PAGES_FROM, ENCODER_PAGES_TO, b, encoder_from, encoder_to,
            PAGE, CHUNK,
        )  # fmt: skip
