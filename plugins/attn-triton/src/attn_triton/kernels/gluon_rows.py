"""What a program of the extend kernel for Hopper does for one block of rows: one producer warp brings pages by the copy
engine, two groups of four warps compute.

A program holds 2 x 64 query rows, (token, head of a KV head's group), and walks tiles of BN keys, which both groups
read. A tile is BN / BOX boxes of BOX tokens, which lie in one page each, times two halves of the 128-wide head; all of
them land in one swizzled tile of shared memory. A group issues the scores of tile i, then the values of tile i - 1, and
does the softmax of the one while the tensor cores work on the other; the two groups never wait for each other but
through the tiles.

Barriers, one a stage each: keys full, values full (copy engine -> groups); keys free, values free (both groups ->
producer). One says that group 0 has cleared what lies behind the sequence. Two, one a group, say whose turn it is to
issue products: so one group computes exponentials while the tensor cores work for the other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

ROWS: gl.constexpr = gl.constexpr(64)


@gluon.jit
def row_of(page_row, key, last_page, first_row, PAGE: gl.constexpr, ROWS_PAGE: gl.constexpr):
    """The row of a pool in which the box with token ``key`` begins; past the end, of the last page."""
    return gl.load(page_row + gl.minimum(key // PAGE, last_page)) * ROWS_PAGE + key % PAGE + first_row


@gluon.jit
def rows_of(
    page_row,
    key,
    last_page,
    first_row,
    BOXES: gl.constexpr,
    BOX: gl.constexpr,
    PAGE: gl.constexpr,
    ROWS_PAGE: gl.constexpr,
):
    """The rows of the boxes of a tile, as a tuple of BOXES, so that their loads are under way together."""
    rows = (row_of(page_row, key, last_page, first_row, PAGE, ROWS_PAGE),)
    for j in gl.static_range(1, BOXES):
        one = row_of(page_row, key + j * BOX, last_page, first_row, PAGE, ROWS_PAGE)
        rows = rows + (one,)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@gluon.jit
def ask(POOL, rows, column, bar, tiles, first, BOXES: gl.constexpr, BOX: gl.constexpr):
    """Ask for one tile: each box in two halves of 64 columns, the halves of the head outermost in ``tiles``."""
    mbarrier.expect(bar, BOXES * BOX * 128 * 2)
    for j in gl.static_range(BOXES):
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                POOL, [rows[j], column + half * 64], bar, tiles.index(first + half * BOXES + j)
            )


@gluon.jit
def produce(
    K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, tiles, last_page, first_row, column,
    BOXES: gl.constexpr, BOX: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr, ROWS_PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: pages of every tile, keys before values."""
    for i in range(0, tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        rows = rows_of(page_row, i * BN, last_page, first_row, BOXES, BOX, PAGE, ROWS_PAGE)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        ask(K_POOL, rows, column, k_full.index(stage), k_boxes, 2 * BOXES * stage, BOXES, BOX)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        ask(V_POOL, rows, column, v_full.index(stage), v_boxes, 2 * BOXES * stage, BOXES, BOX)


@gluon.jit
def clear_tail(tile, rows, BN: gl.constexpr):
    """Zero the values from ``rows`` on: behind a sequence lies anything, and 0 * NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    r = gl.arange(0, BN, gl.SliceLayout(1, layout))
    x = tile.load(layout)
    tile.store(gl.where((r < rows)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def fold(
    s, top, total, i, last_seen, scale, MASKED: gl.constexpr, BN: gl.constexpr, mma: gl.constexpr, dtype: gl.constexpr
):
    """The scores of tile ``i`` into the running softmax: probabilities as an operand, and the factor on what was
    before.
    """
    if MASKED:
        n = i * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
        s = gl.where(n[None, :] <= last_seen[:, None], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new_top[:, None])
    factor = gl.exp2(top - new_top)
    total = total * factor + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, mma, 2)), factor, new_top, total


@gluon.jit
def again(number):
    """``number`` as the compiler does not know it: what follows from it is computed again, and holds no registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def run_tiles(
    p, acc, top, total, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns, begin, end, tiles, last_seen,
    scale, WHICH: gl.constexpr, MASKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Tiles ``begin``..``end`` (begin > 0) of ``tiles``. ``p`` are the probabilities of the tile before, whose values
    are not in ``acc`` yet. The keys of the first tile are here; so will be those of tile ``end``.
    """
    for i in range(begin, end):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(turns.index(WHICH), (i - 1 & 1) ^ (1 - WHICH))
        zero = gl.zeros([ROWS, BN], gl.float32, mma)
        s = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        mbarrier.arrive(turns.index(1 - WHICH), count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        gl.thread_barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        p, factor, top, total = fold(s, top, total, i, last_seen, scale, MASKED, BN, mma, v_tiles.dtype)
        # A wait is a branch, over which ptxas does not pull the wait for the values: it would come before the softmax.
        mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < tiles)
        a = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(v_free.index(before), count=1)
        acc = warpgroup_mma_init(a * factor[:, None])
    return p, acc, top, total


@gluon.jit
def consume(
    Q, OUT, LSE, h, block, q_start, query_len, prefix, length, q_tiles, k_tiles, v_tiles, k_full, v_full,
    k_free, v_free, turns, cleared, tiles, q_token, q_head, out_token, out_head, scale, v_scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    HAS_LSE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One group: its 64 rows of the queries to shared memory, all tiles, the output."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    first = (block * 2 + WHICH) * ROWS
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    column = gl.arange(0, 128, gl.SliceLayout(0, flat))
    q_at = ((q_start + rows // GROUP).to(gl.int64) * q_token + (h * GROUP + rows % GROUP) * q_head) * UNIT
    q = q_tiles.index(WHICH)
    q.store(gl.load(Q + q_at[:, None] + column[None, :], mask=(rows // GROUP < query_len)[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    last_seen = gl.minimum(prefix + (first + gl.arange(0, ROWS, row_layout)) // GROUP, length - 1)
    full = gl.minimum(gl.maximum(prefix + first // GROUP + 1, 0) // BN, tiles)
    top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = warpgroup_mma_init(gl.zeros([ROWS, 128], gl.float32, mma))
    mbarrier.wait(k_full.index(0), 0)
    zero = gl.zeros([ROWS, BN], gl.float32, mma)
    s = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    gl.thread_barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    p, _, top, total = fold(s, top, total, 0, last_seen, scale, True, BN, mma, v_tiles.dtype)
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=tiles > 1)
    full = gl.maximum(full, 1)
    p, acc, top, total = run_tiles(
        p, acc, top, total, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns, 1, full, tiles, last_seen,
        scale, WHICH, False, BN, STAGES, mma,
    )  # fmt: skip
    p, acc, top, total = run_tiles(
        p, acc, top, total, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, turns, full, tiles, tiles, last_seen,
        scale, WHICH, True, BN, STAGES, mma,
    )  # fmt: skip
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    if tiles * BN > length:
        if WHICH == 0:
            clear_tail(v_tiles.index(last), length - (tiles - 1) * BN, BN)
            mbarrier.arrive(cleared.index(0), count=1)
        else:
            mbarrier.wait(cleared.index(0), 0)
    acc = warpgroup_mma(p, v_tiles.index(last), acc, is_async=True)
    o = warpgroup_mma_wait(0, deps=(acc,))
    inverse = v_scale / gl.where(total > 0.0, total, 1.0)
    o = gl.convert_layout((o * inverse[:, None]).to(OUT.dtype.element_ty), flat)
    first = again(first)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    out_at = ((q_start + rows // GROUP).to(gl.int64) * out_token + (h * GROUP + rows % GROUP) * out_head) * UNIT
    gl.store(OUT + out_at[:, None] + column[None, :], o, mask=(rows // GROUP < query_len)[:, None])
    if HAS_LSE:
        m_rows = first + gl.arange(0, ROWS, row_layout)
        base2 = gl.where(total > 0.0, top + gl.log2(gl.where(total > 0.0, total, 1.0)), float("-inf"))
        lse_at = (q_start + m_rows // GROUP) * HEADS + h * GROUP + m_rows % GROUP
        gl.store(LSE + lse_at, base2 * 0.6931471805599453, mask=m_rows // GROUP < query_len)
