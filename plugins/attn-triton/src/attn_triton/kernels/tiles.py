"""What every attention kernel does with one tile: load rows, score, mask, and fold into the running softmax."""

# Triton reads annotations of constexpr parameters at run time, so this file has no `from __future__ import
# annotations`.
import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, mask, OFFSET: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """[R, WIDTH]: columns OFFSET.. of the rows at element offsets ``rows`` [R]; columns from DIM on are 0, as are
    masked rows.
    """
    columns = OFFSET + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] + columns[None, :]
    if OFFSET + WIDTH > DIM:
        inside = (columns < DIM)[None, :]
        if MASKED:
            inside = inside & mask[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def widened(x):
    """An fp8 tile as float16, in NVIDIA's own instructions.

    Written as a conversion, the compiler moves it behind the change to the tensor cores' layout, and then reads a tile
    whose keys are to be summed over byte by byte: twice the instructions of the whole loop. It does not move what it
    does not know.
    """
    if x.dtype == tl.float8e4nv:
        wide = tl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    else:
        wide = tl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e5m2x2 $0, lo; cvt.rn.f16x2.e5m2x2 $1, hi; }",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    return wide


@triton.jit
def dot(a, b, acc):
    """a [M, K] times b [K, N] onto acc [M, N] fp32; b takes the dtype of a (an fp8 tile becomes the queries' dtype,
    exactly).
    """
    return tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")


@triton.jit
def scores(q0, q1, k0, k1, M: tl.constexpr, N: tl.constexpr, D1: tl.constexpr):
    """[M, N] fp32: q.k of heads that lie in one or two parts (576 is 512 and 64, 96 is 64 and 32)."""
    s = dot(q0, tl.trans(k0), tl.zeros([M, N], tl.float32))
    if D1 > 0:
        s = dot(q1, tl.trans(k1), s)
    return s


@triton.jit
def halved(q0, q1, D1: tl.constexpr):
    """Queries as float16, scaled by a power of two for each row, and what undoes it [M].

    An fp8 number becomes float16 in one instruction for two, and bfloat16 in many. The largest of a row goes to
    2^13..2^14: products with fp8 numbers stay inside float32, and only what is 2^-28 of it or less loses bits.
    """
    peak = tl.max(tl.abs(q0.to(tl.float32)), 1)
    if D1 > 0:
        peak = tl.maximum(peak, tl.max(tl.abs(q1.to(tl.float32)), 1))
    exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 255, 14)
    up = ((267 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
    half0 = (q0.to(tl.float32) * up[:, None]).to(tl.float16)
    half1 = half0
    if D1 > 0:
        half1 = (q1.to(tl.float32) * up[:, None]).to(tl.float16)
    return half0, half1, down


@triton.jit
def with_sink(top, total, sink):
    """A sink's logit (in base 2) into the running softmax, after the keys: the factor on the accumulators, top, total.

    After and not before: probabilities are 16 bit, and beside a large sink they would all be next to nothing.
    """
    new_top = tl.maximum(top, sink)
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    factor = tl.exp2(top - finite)
    return factor, new_top, total * factor + tl.exp2(sink - finite)


@triton.jit
def soft_capped(s, scale, cap):
    """cap * tanh(s * scale), where the host has put log2(e) into ``cap`` and 1 / the layer's cap into ``scale``.

    tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2|x|): no overflow at either end.
    """
    s = s * scale
    e = tl.exp2(tl.abs(s) * -2.8853900817779268)  # 2 log2(e)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(s < 0.0, -t, t) * cap


@triton.jit
def softmax_step(s, top, total, scale, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """One online-softmax step in base 2 over scores [M, N]: probabilities, the factor [M] on what came before, new top,
    new total.

    Without a soft cap ``scale`` (log2(e) in it) is applied here, in the one fused multiply-subtract that the exponent
    needs. MASKED tiles may leave a row without any key: its top stays -inf, and its probabilities and factor are 0, not
    NaN.
    """
    peak = tl.max(s, 1)
    if not HAS_CAP:
        peak = peak * scale
    new_top = tl.maximum(top, peak)
    finite = new_top
    if MASKED:
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    if HAS_CAP:
        p = tl.exp2(s - finite[:, None])
    else:
        p = tl.exp2(s * scale - finite[:, None])
    factor = tl.exp2(top - finite)
    total = total * factor + tl.sum(p, 1)
    return p, factor, new_top, total


@triton.jit
def visible_keys(
    n,
    first_seen,
    last_seen,
    prefix,
    row_live,
    token,
    tree_row,
    depth_row,
    TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_TREE: tl.constexpr,
):
    """[M, N] bool: which of the keys ``n`` [N] each row sees.

    A row sees first_seen[row]..last_seen[row]. With a TREE the draft tokens, keys ``prefix``.., are seen by the
    request's mask instead: ``tree_row`` points to its [q, q] bool, ``depth_row`` to its [q] depths; a window counts
    positions.
    """
    seen = (n[None, :] >= first_seen[:, None]) & (n[None, :] <= last_seen[:, None])
    if TREE:
        draft = n - prefix
        is_draft = (draft >= 0) & (draft < Q_TREE)
        inside = row_live[:, None] & is_draft[None, :]
        bits = tl.load(tree_row + token[:, None] * Q_TREE + draft[None, :], mask=inside, other=0)
        by_tree = bits.to(tl.int32) != 0
        if WINDOW:
            key_depth = tl.load(depth_row + draft, mask=is_draft, other=0)
            by_tree = by_tree & ((prefix + key_depth)[None, :] >= first_seen[:, None])
        seen = tl.where(is_draft[None, :], by_tree, seen & (draft < 0)[None, :])
    return seen


@triton.jit
def finish(acc, total):
    """acc / total; rows that saw no key (acc is 0 there) stay 0."""
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def log_sum(top, total):
    """log2 of the sum of 2^score: -inf for rows that saw no key."""
    return tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
