"""MLA decode for Hopper in Gluon: three roles share every latent tile, one for scores and softmax, two for values.

A program holds 64 query rows, (token, head), and walks tiles of 64 latent rows of 576 that the copy engine brings. The
score role computes the scores of a tile; each value role multiplies the probabilities with a half of the tile's first
512 columns, and its accumulator, 64 x 256 in fp32, never leaves its registers. Two tiles fit beside the queries. So the
first half of the values follows at once, which makes room for half of the tile after the next, and the second half
waits until the next scores are there: then tensor cores have work during the next softmax. (Not where all rows of a
request are one program's: then memory is what programs wait for, and a buffer is better free sooner.) Most of the
queries lie in the score role's registers: both operands of a product 64 wide take all the bandwidth of shared memory.
Their last 64 columns lie nowhere else, which leaves room for two tiles of probabilities.

Barriers; tiles are counted over all pieces of a program, ``it``, and tile ``it`` is in buffer it % NB and has
probabilities it % 2:
  fulls     a half of a tile is here   copy engine -> scores; the last 64 columns come with the first half
  scored    scores are computed        scores -> the second half of the values, of the tile before
  ready     probabilities are there    scores -> values, with the factors on what was before
  consumed  a tile is not needed       values -> scores, which write over its probabilities; a value role asks itself
                                       for what comes next into its half of the buffer
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

from attn_triton.kernels.gluon_mla_pieces import (
    clear_tail,
    first_piece,
    line_of,
    load_half,
    query_range,
    row_of,
    write_rows,
)

#: Parts of 64 columns of the queries that the score role holds in registers, of nine.
HELD: gl.constexpr = gl.constexpr(6)
#: By how much (in powers of two) scores may exceed what is subtracted from them, before that and what was computed with
#: it are changed: most tiles then change nothing of the accumulator, and 2**8 is far from what 16 bits or fp32 hold.
SLACK: gl.constexpr = gl.constexpr(8.0)
#: Which of the barriers that are needed once a piece.
QUERIES: gl.constexpr = gl.constexpr(0)
SUMMED: gl.constexpr = gl.constexpr(1)
DONE: gl.constexpr = gl.constexpr(2)


@gluon.jit
def lane_sums(p):
    """[64, 4]: of the sums of rows, what each lane of a row holds, so that nothing travels between lanes."""
    return gl.sum(gl.sum(p.reshape([64, 8, 4, 2]), 3), 1)


@gluon.jit
def score_tile(
    i, it, top, total, held, q_boxes, k_boxes, k1s, ps, factors, flags, fulls, consumed, scored, ready, length,
    last_seen, scale, MASKED: gl.constexpr, LATE: gl.constexpr, NB: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of tile ``i``; the running maxima, and sums by lane."""
    buf = it % NB
    mbarrier.wait(fulls[0].index(buf), (it // NB) & 1)
    s = gl.zeros([64, 64], gl.float32, layout=mma)
    for c in gl.static_range(4):
        q = q_boxes.index(c) if c < 9 - HELD else held[c - 9 + HELD]
        s = warpgroup_mma(q, k_boxes[0].index(buf * 4 + c).permute((1, 0)), s, use_acc=c > 0, is_async=True)
    s = warpgroup_mma(held[HELD - 1], k1s.index(buf).permute((1, 0)), s, is_async=True)
    mbarrier.wait(fulls[1].index(buf), (it // NB) & 1)
    for c in gl.static_range(4, 8):
        q = q_boxes.index(c) if c < 9 - HELD else held[c - 9 + HELD]
        s = warpgroup_mma(q, k_boxes[1].index(buf * 4 + c - 4).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    if LATE:
        mbarrier.arrive(scored.index(it % 2), count=1)
    if MASKED:
        if (i + 1) * 64 > length:
            clear_tail(k_boxes, buf, length - i * 64)
        column = gl.arange(0, 64, gl.SliceLayout(0, mma))
        s = gl.where((i * 64 + column)[None, :] <= last_seen[:, None], s, float("-inf"))
    most = gl.max(s, 1) * scale
    grows = most > top + SLACK
    new_top = gl.where(grows, most, top)
    finite = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    factor = gl.exp2(top - finite)
    before = it + NB - 2  # that of tile it - 2, which had the place of these probabilities; at first nobody waits
    mbarrier.wait(consumed.index(before % NB), ((before // NB) & 1) ^ 1)
    factors.index(it % 2).store(factor)
    flags.index(it % 2).store(gl.max(grows.to(gl.int32).reshape([4, 16]), 1))
    p = gl.exp2(s * scale - finite[:, None])
    ps.index(it % 2).store(p.to(ps.dtype))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(ready.index(it % 2), count=1)
    own = gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    return new_top, total * own[:, None] + lane_sums(p)


@gluon.jit
def score_role(
    Q_NOPE, Q_ROPE, q0, ks, k1s, ps, factors, flags, sums, fulls, consumed, scored, ready, ends, LENGTHS, STARTS, LSE,
    PART_LSE, LINE, BOUNDS, FIRST, splits, scale, H: gl.constexpr, TILES: gl.constexpr, FIXED: gl.constexpr,
    SINGLE: gl.constexpr, HAS_LSE: gl.constexpr, NB: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of every tile of this program's piece of the line."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    q_boxes = q0._reinterpret(q0.dtype, [8, 64, 64], q0.layout)
    k_boxes = (
        ks[0]._reinterpret(q0.dtype, [4 * NB, 64, 64], q0.layout),
        ks[1]._reinterpret(q0.dtype, [4 * NB, 64, 64], q0.layout),
    )
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
                i, it, top, shares, held, q_boxes, k_boxes, k1s, ps, factors, flags, fulls, consumed, scored, ready,
                length, last_seen, scale, False, TILES > 1, NB, mma,
            )  # fmt: skip
            it += 1
        for i in range(whole, behind):
            top, shares = score_tile(
                i, it, top, shares, held, q_boxes, k_boxes, k1s, ps, factors, flags, fulls, consumed, scored, ready,
                length, last_seen, scale, True, TILES > 1, NB, mma,
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
def value_role(
    NOPE, ROPE, ks, k1s, ps, factors, flags, sums, full, consumed, scored, ready, ends, PAGES, LENGTHS, STARTS, OUT,
    PART_OUT, LINE, BOUNDS, FIRST, splits, out_token, out_head, page_stride, v_scale,
    H: gl.constexpr, TILES: gl.constexpr, PAGE: gl.constexpr, FIXED: gl.constexpr, SINGLE: gl.constexpr,
    NB: gl.constexpr, UNIT: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """The accumulator: probabilities times the tiles' first 512 columns, and the output; and the copies, since nobody
    knows sooner that a buffer is free.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    t = gl.program_id(0) % TILES
    g = gl.program_id(0) // TILES
    b, pos, end = first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED)
    start = pos
    it = 0
    piece = 0
    flat: gl.constexpr = gl.BlockedLayout([1, 128 // OUT.dtype.element_ty.primitive_bitwidth], [4, 8], [4, 1], [1, 0])
    local = gl.arange(0, 64, row_layout)
    column = 256 * SIDE + gl.arange(0, 256, gl.SliceLayout(0, mma))
    while pos < end:
        line0, line1, length = line_of(LENGTHS, LINE, b, FIXED)
        q_start, query_len = query_range(STARTS, b, SINGLE)
        stop = gl.minimum(end, line1)
        first = pos - line0
        behind = gl.minimum(stop - line0, (length + 63) // 64)
        page_row = PAGES + b.to(gl.int64) * page_stride
        for w in gl.static_range(NB):
            if first + w < behind:
                if w == 1:  # the queries and the first tile are needed sooner
                    mbarrier.wait(ends.index(QUERIES), piece & 1)
                load_half(NOPE, ROPE, ks, k1s, full, (it + w) % NB, row_of(page_row, first + w, behind, PAGE), SIDE)
        row = row_of(page_row, first + NB, behind, PAGE)
        acc = gl.zeros([64, 256], gl.float32, layout=mma)
        for i in range(first, behind):
            buf = it % NB
            mbarrier.wait(ready.index(it % 2), (it // 2) & 1)
            changed = gl.max(flags.index(it % 2).load(gl.BlockedLayout([4], [32], [4], [0])), 0)
            if changed > 0:
                acc = acc * factors.index(it % 2).load(row_layout)[:, None]
            if SIDE == 1 and TILES > 1:  # beside the next softmax
                if i + 1 < behind:
                    mbarrier.wait(scored.index((it + 1) % 2), ((it + 1) // 2) & 1)
            acc = warpgroup_mma(ps.index(it % 2), ks.index(buf), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(consumed.index(buf), count=1)
            if i + NB < behind:
                load_half(NOPE, ROPE, ks, k1s, full, buf, row, SIDE)
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
            write_rows(acc, ks, OUT, out_row + 256 * SIDE, r // H < query_len, flat)
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
    left = gl.allocate_shared_memory(dtype, [NB, 64, 256], NOPE.layout)
    right = gl.allocate_shared_memory(dtype, [NB, 64, 256], NOPE.layout)
    k1s = gl.allocate_shared_memory(dtype, [NB, 64, 64], ROPE.layout)
    ps = gl.allocate_shared_memory(dtype, [2, 64, 64], square)
    factors = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    flags = gl.allocate_shared_memory(gl.int32, [2, 4], vector)
    sums = gl.allocate_shared_memory(gl.float32, [64], vector)
    full_left = gl.allocate_shared_memory(gl.int64, [NB, 1], bar)
    full_right = gl.allocate_shared_memory(gl.int64, [NB, 1], bar)
    consumed = gl.allocate_shared_memory(gl.int64, [NB, 1], bar)
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    ends = gl.allocate_shared_memory(gl.int64, [3, 1], bar)
    for i in gl.static_range(NB):
        mbarrier.init(full_left.index(i), count=1)
        mbarrier.init(full_right.index(i), count=1)
        mbarrier.init(consumed.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(scored.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(3):
        mbarrier.init(ends.index(i), count=2 if i == DONE else 1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                value_role,
                (
                    NOPE, ROPE, left, k1s, ps, factors, flags, sums, full_left, consumed, scored, ready, ends, PAGES,
                    LENGTHS, STARTS, OUT, PART_OUT, LINE, BOUNDS, FIRST, splits, out_token, out_head, page_stride,
                    v_scale, H, TILES, PAGE, FIXED, SINGLE, NB, UNIT, 0,
                ),
            ),
            (
                value_role,
                (
                    NOPE, ROPE, right, k1s, ps, factors, flags, sums, full_right, consumed, scored, ready, ends, PAGES,
                    LENGTHS, STARTS, OUT, PART_OUT, LINE, BOUNDS, FIRST, splits, out_token, out_head, page_stride,
                    v_scale, H, TILES, PAGE, FIXED, SINGLE, NB, UNIT, 1,
                ),
            ),
            (
                score_role,
                (
                    Q_NOPE, Q_ROPE, q0, (left, right), k1s, ps, factors, flags, sums, (full_left, full_right), consumed,
                    scored, ready, ends, LENGTHS, STARTS, LSE, PART_LSE, LINE, BOUNDS, FIRST, splits, scale, H,
                    TILES, FIXED, SINGLE, HAS_LSE, NB,
                ),
            ),
        ],
        [4, 4],
        [160, 184],
    )  # fmt: skip
