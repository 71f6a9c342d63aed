"""MLA decode for Hopper in Gluon: two roles share every latent tile, one for scores and softmax, one for values.

A program holds 64 query rows, (token, head), and walks tiles of 64 latent rows of 576 that the copy engine brings. The
score role (4 warps) computes the scores of tile i + 1 while the value role (8 warps) multiplies the probabilities of
tile i with the same tile's first 512 columns; the accumulator, 64 x 512 in fp32, never leaves the value role's
registers. Most of the queries lie in the score role's registers: both operands of a product 64 wide take all the
bandwidth of shared memory. Their last 64 columns lie nowhere else, which leaves room for two tiles of probabilities.

Barriers; tiles are counted over all pieces of a program, ``it``, and tile ``it`` is in buffer it % NB and has
probabilities it % 2:
  full      a tile is here             copy engine -> scores
  consumed  a tile is not needed       values -> scores, which write over its probabilities; the value role itself asks
                                       for the tile that comes next into the buffer
  scaled    the factors on what was before are there, so that values rescale while the exponentials are computed
  ready     probabilities are there    scores -> values
  ends      once a piece: queries full; row sums ready, scores -> values; piece done, values -> scores, without which a
            piece of no tiles would let the scores run ahead
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: Parts of 64 columns of the queries that the score role holds in registers, of nine.
HELD: gl.constexpr = gl.constexpr(6)
#: Which of the barriers that are needed once a piece.
QUERIES: gl.constexpr = gl.constexpr(0)
SUMMED: gl.constexpr = gl.constexpr(1)
DONE: gl.constexpr = gl.constexpr(2)


@gluon.jit
def load_tile(NOPE, ROPE, k0s, k1s, full, buf, row):
    """Ask for the 64 latent rows from ``row`` on."""
    bar = full.index(buf)
    mbarrier.expect(bar, 64 * 576 * 2)
    tma.async_copy_global_to_shared(NOPE, [row, 0], bar, k0s.index(buf))
    tma.async_copy_global_to_shared(ROPE, [row, 512], bar, k1s.index(buf))


@gluon.jit
def row_of(page_row, i, behind, PAGE: gl.constexpr):
    """The pool's row in which tile ``i`` begins; past the end, that of the last tile."""
    PER: gl.constexpr = PAGE // 64
    at = gl.minimum(i, gl.maximum(behind - 1, 0))
    return gl.load(page_row + at // PER) * PAGE + at % PER * 64


@gluon.jit
def clear_tail(k_boxes, buf, rows):
    """Zero the latent rows from ``rows`` on: behind a sequence lies anything, and 0 * NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for c in gl.static_range(8):
        part = k_boxes.index(buf * 8 + c)
        x = part.load(layout)
        part.store(gl.where((r < rows)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED: gl.constexpr):
    """(request, begin, end) of a program's part of the line of tiles; see kernels/decode.py."""
    if FIXED:
        b = g // splits
        line1 = gl.maximum((gl.load(LENGTHS + b) + 63) // 64, 1)
        per = (line1 + splits - 1) // splits
        pos = (g % splits) * per
        end = gl.minimum(pos + per, line1)
    else:
        b = gl.load(FIRST + g)
        pos = gl.load(BOUNDS + g)
        end = gl.load(BOUNDS + g + 1)
    return b, pos, end


@gluon.jit
def line_of(LENGTHS, LINE, b, FIXED: gl.constexpr):
    """Where request ``b`` begins and ends on the line, and its length."""
    length = gl.load(LENGTHS + b)
    if FIXED:
        line0 = b * 0
        line1 = gl.maximum((length + 63) // 64, 1)
    else:
        line0 = gl.load(LINE + b)
        line1 = gl.load(LINE + b + 1)
    return line0, line1, length


@gluon.jit
def query_range(STARTS, b, SINGLE: gl.constexpr):
    """First token and number of tokens of request ``b``."""
    if SINGLE:
        return b, b * 0 + 1
    else:
        start = gl.load(STARTS + b)
        return start, gl.load(STARTS + b + 1) - start


@gluon.jit
def lane_sums(p):
    """[64, 4]: of the sums of rows, what each lane of a row holds, so that nothing travels between lanes."""
    return gl.sum(gl.sum(p.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def score_tile(
    i, it, top, total, held, q_boxes, k_boxes, k1s, ps, factors, full, consumed, scaled, ready, length, last_seen,
    scale, MASKED: gl.constexpr, NB: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of tile ``i``; the running maxima, and sums by lane."""
    buf = it % NB
    mbarrier.wait(full.index(buf), (it // NB) & 1)
    s = gl.zeros([64, 64], gl.float32, layout=mma)
    for c in gl.static_range(9):
        k = k_boxes.index(buf * 8 + c) if c < 8 else k1s.index(buf)
        q = q_boxes.index(c) if c < 9 - HELD else held[c - 9 + HELD]
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    if MASKED:
        if (i + 1) * 64 > length:
            clear_tail(k_boxes, buf, length - i * 64)
        column = gl.arange(0, 64, gl.SliceLayout(0, mma))
        s = gl.where((i * 64 + column)[None, :] <= last_seen[:, None], s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    finite = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    factor = gl.exp2(top - finite)
    before = it + NB - 2  # that of tile it - 2, which had the place of these probabilities; at first nobody waits
    mbarrier.wait(consumed.index(before % NB), ((before // NB) & 1) ^ 1)
    factors.index(it % 2).store(factor)
    gl.thread_barrier()
    mbarrier.arrive(scaled.index(it % 2), count=1)
    # A wait that is over: it is a branch, over which ptxas does not pull the exponentials before the arrival.
    mbarrier.wait(full.index(buf), (it // NB) & 1)
    p = gl.exp2(s * scale - finite[:, None])
    ps.index(it % 2).store(p.to(ps.dtype))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(ready.index(it % 2), count=1)
    own = gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    return new_top, total * own[:, None] + lane_sums(p)


@gluon.jit
def score_role(
    Q_NOPE, Q_ROPE, q0, k0s, k1s, ps, factors, sums, full, consumed, scaled, ready, ends, LENGTHS, STARTS, LSE,
    PART_LSE, LINE, BOUNDS, FIRST, splits, scale, H: gl.constexpr, TILES: gl.constexpr, FIXED: gl.constexpr,
    SINGLE: gl.constexpr, HAS_LSE: gl.constexpr, NB: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of every tile of this program's piece of the line."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    q_boxes = q0._reinterpret(q0.dtype, [8, 64, 64], q0.layout)
    k_boxes = k0s._reinterpret(k0s.dtype, [8 * NB, 64, 64], k0s.layout)
    t = gl.program_id(0) % TILES
    g = gl.program_id(0) // TILES
    b, pos, end = first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED)
    start = pos
    it = 0
    piece = 0
    r = t * 64 + gl.arange(0, 64, row_layout)
    while pos < end:
        line0, line1, length = line_of(LENGTHS, LINE, b, FIXED)
        q_start, query_len = query_range(STARTS, b, SINGLE)
        stop = gl.minimum(end, line1)
        first = pos - line0
        behind = gl.minimum(stop - line0, (length + 63) // 64)
        token = r // H
        last_seen = length - query_len + gl.minimum(token, query_len - 1)
        if it > 0:  # the last columns of the queries come to where probabilities lie
            mbarrier.wait(consumed.index((it - 1) % NB), ((it - 1) // NB) & 1)
        mbarrier.expect(ends.index(QUERIES), 64 * 576 * 2)
        tma.async_copy_global_to_shared(Q_NOPE, [q_start * H + t * 64, 0], ends.index(QUERIES), q0)
        tma.async_copy_global_to_shared(Q_ROPE, [q_start * H + t * 64, 512], ends.index(QUERIES), ps.index(1))
        top = gl.full([64], float("-inf"), gl.float32, layout=row_layout)
        shares = lane_sums(gl.zeros([64, 64], gl.float32, layout=mma))
        mbarrier.wait(ends.index(QUERIES), piece & 1)
        held = (ps.index(1).load(left),)
        for c in gl.static_range(1, HELD):
            held = (q_boxes.index(8 - c).load(left),) + held  # type: ignore[assignment]  # noqa: RUF005
        gl.thread_barrier()
        whole = gl.minimum(gl.maximum((length - query_len + 1) // 64, first), behind)
        for i in range(first, whole):
            top, shares = score_tile(
                i, it, top, shares, held, q_boxes, k_boxes, k1s, ps, factors, full, consumed, scaled, ready, length,
                last_seen, scale, False, NB, mma,
            )  # fmt: skip
            it += 1
        for i in range(whole, behind):
            top, shares = score_tile(
                i, it, top, shares, held, q_boxes, k_boxes, k1s, ps, factors, full, consumed, scaled, ready, length,
                last_seen, scale, True, NB, mma,
            )  # fmt: skip
            it += 1
        total = gl.convert_layout(gl.sum(shares, 1), row_layout)
        if piece > 0:
            mbarrier.wait(ends.index(DONE), (piece - 1) & 1)
        sums.store(total)
        gl.thread_barrier()
        mbarrier.arrive(ends.index(SUMMED), count=1)
        base2 = gl.where(total > 0.0, top + gl.log2(gl.where(total > 0.0, total, 1.0)), float("-inf"))
        if (pos == line0) & (stop == line1):
            if HAS_LSE:
                at = LSE + q_start * H + r
                gl.store(at, base2 * 0.6931471805599453, mask=token < query_len)
        else:
            slot = g
            if not FIXED:
                slot = 2 * g + (pos != start).to(gl.int32)
            gl.store(PART_LSE + (slot * TILES + t) * 64 + gl.arange(0, 64, row_layout), base2)
        piece += 1
        pos = stop
        if not FIXED:
            b += 1


@gluon.jit
def write_rows(acc, tiles, POINTER, row, live, flat: gl.constexpr):
    """``acc`` to the ``live`` ones of 64 rows, which begin at ``row``, by way of the memory of ``tiles``: a thread has
    two numbers of a row side by side, and stores of so little took a tenth of a program's time. (Of parts, which are
    fp32, these are 8 bytes, four threads fill 32, and the way around costs more than it saves.)
    """
    dtype: gl.constexpr = POINTER.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WIDE: gl.constexpr = 1024 // BITS
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    tiles._reinterpret(dtype, [64, 512], swizzled).store(acc.to(dtype))
    gl.thread_barrier()
    boxes = tiles._reinterpret(dtype, [512 // WIDE, 64, WIDE], swizzled)
    column = gl.arange(0, WIDE, gl.SliceLayout(0, flat))
    for c in gl.static_range(512 // WIDE):
        gl.store(POINTER + row[:, None] + WIDE * c + column[None, :], boxes.index(c).load(flat), mask=live[:, None])
    fence_async_shared()  # the copy engine writes here next
    gl.thread_barrier()


@gluon.jit
def value_role(
    NOPE, ROPE, k0s, k1s, ps, factors, sums, full, consumed, scaled, ready, ends, PAGES, LENGTHS, STARTS, OUT, PART_OUT,
    LINE, BOUNDS, FIRST, splits, out_token, out_head, page_stride, v_scale,
    H: gl.constexpr, TILES: gl.constexpr, PAGE: gl.constexpr, FIXED: gl.constexpr, SINGLE: gl.constexpr,
    NB: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """The accumulator: probabilities times the tiles' first 512 columns, and the output; and the copies, since nobody
    knows sooner that a buffer is free.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    t = gl.program_id(0) % TILES
    g = gl.program_id(0) // TILES
    b, pos, end = first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED)
    start = pos
    it = 0
    piece = 0
    flat: gl.constexpr = gl.BlockedLayout([1, 128 // OUT.dtype.element_ty.primitive_bitwidth], [4, 8], [8, 1], [1, 0])
    local = gl.arange(0, 64, row_layout)
    column = gl.arange(0, 512, gl.SliceLayout(0, mma))
    while pos < end:
        line0, line1, length = line_of(LENGTHS, LINE, b, FIXED)
        q_start, query_len = query_range(STARTS, b, SINGLE)
        stop = gl.minimum(end, line1)
        first = pos - line0
        behind = gl.minimum(stop - line0, (length + 63) // 64)
        page_row = PAGES + b.to(gl.int64) * page_stride
        for w in gl.static_range(NB):
            if first + w < behind:
                load_tile(NOPE, ROPE, k0s, k1s, full, (it + w) % NB, row_of(page_row, first + w, behind, PAGE))
        row = row_of(page_row, first + NB, behind, PAGE)
        acc = gl.zeros([64, 512], gl.float32, layout=mma)
        for i in range(first, behind):
            buf = it % NB
            mbarrier.wait(scaled.index(it % 2), (it // 2) & 1)
            acc = acc * factors.index(it % 2).load(row_layout)[:, None]
            mbarrier.wait(ready.index(it % 2), (it // 2) & 1)
            acc = warpgroup_mma(ps.index(it % 2), k0s.index(buf), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(consumed.index(buf), count=1)
            if i + NB < behind:
                load_tile(NOPE, ROPE, k0s, k1s, full, buf, row)
            row = row_of(page_row, i + NB + 1, behind, PAGE)
            it += 1
        mbarrier.wait(ends.index(SUMMED), piece & 1)
        total = sums.load(row_layout)
        gl.thread_barrier()
        mbarrier.arrive(ends.index(DONE), count=1)
        acc = acc * (v_scale / gl.where(total > 0.0, total, 1.0))[:, None]
        if (pos == line0) & (stop == line1):
            r = t * 64 + gl.arange(0, 64, gl.SliceLayout(1, flat))
            out_row = ((q_start + r // H).to(gl.int64) * out_token + (r % H) * out_head) * UNIT
            write_rows(acc, k0s, OUT, out_row, r // H < query_len, flat)
        else:
            slot = g
            if not FIXED:
                slot = 2 * g + (pos != start).to(gl.int32)
            part_row = (slot * TILES + t) * 64 + local
            part_at = PART_OUT + part_row.to(gl.int64)[:, None] * 512 + column[None, :]
            gl.store(part_at, acc, mask=((t * 64 + local) // H < query_len)[:, None])
        piece += 1
        pos = stop
        if not FIXED:
            b += 1


@gluon.jit(
    do_not_specialize=[
        "Q_NOPE", "Q_ROPE", "NOPE", "ROPE", "splits", "out_token", "out_head", "page_stride", "scale", "v_scale",
    ]
)  # fmt: skip
def mla_kernel(
    Q_NOPE,
    Q_ROPE,
    NOPE,
    ROPE,
    PAGES,
    LENGTHS,
    STARTS,
    OUT,
    LSE,
    PART_OUT,
    PART_LSE,
    LINE,
    BOUNDS,
    FIRST,
    splits,
    out_token,
    out_head,
    page_stride,
    scale,
    v_scale,
    H: gl.constexpr,
    TILES: gl.constexpr,
    PAGE: gl.constexpr,
    FIXED: gl.constexpr,
    SINGLE: gl.constexpr,
    HAS_LSE: gl.constexpr,
    NB: gl.constexpr,
    UNIT: gl.constexpr,
):
    """Grid (groups * TILES). Q_NOPE, Q_ROPE: the queries [T * H, 576] in boxes [64, 512] and [64, 64]; NOPE, ROPE
    likewise the latent rows of all pages; PAGE a multiple of 64; strides of OUT in units of UNIT."""
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = Q_NOPE.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q0 = gl.allocate_shared_memory(dtype, [64, 512], Q_NOPE.layout)
    k0s = gl.allocate_shared_memory(dtype, [NB, 64, 512], NOPE.layout)
    k1s = gl.allocate_shared_memory(dtype, [NB, 64, 64], ROPE.layout)
    ps = gl.allocate_shared_memory(dtype, [2, 64, 64], square)
    factors = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    sums = gl.allocate_shared_memory(gl.float32, [64], vector)
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], bar)
    consumed = gl.allocate_shared_memory(gl.int64, [NB, 1], bar)
    scaled = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ends = gl.allocate_shared_memory(gl.int64, [3, 1], bar)
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(consumed.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(scaled.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(3):
        mbarrier.init(ends.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                value_role,
                (
                    NOPE, ROPE, k0s, k1s, ps, factors, sums, full, consumed, scaled, ready, ends, PAGES, LENGTHS,
                    STARTS, OUT, PART_OUT, LINE, BOUNDS, FIRST, splits, out_token, out_head, page_stride, v_scale, H,
                    TILES, PAGE, FIXED, SINGLE, NB, UNIT,
                ),
            ),
            (
                score_role,
                (
                    Q_NOPE, Q_ROPE, q0, k0s, k1s, ps, factors, sums, full, consumed, scaled, ready, ends, LENGTHS,
                    STARTS, LSE, PART_LSE, LINE, BOUNDS, FIRST, splits, scale, H, TILES, FIXED, SINGLE, HAS_LSE, NB,
                ),
            ),
        ],
        [4],
        [184],
    )  # fmt: skip
