"""MLA decode for Hopper in Gluon: two roles share every latent tile, one for scores and softmax, one for values.

A program holds 64 query rows, (token, head), and walks tiles of 64 latent rows of 576 that the copy engine brings. The
score role (4 warps) computes the scores of tile i + 1 while the value role (8 warps) multiplies the probabilities of
tile i with the same tile's first 512 columns; the accumulator, 64 x 512 in fp32,
never leaves the value role's registers.

Barriers, with NB tile buffers (tiles are counted over all pieces of a program, ``it``):
  0..NB-1        tile full            copy engine -> scores
  NB             queries full         copy engine -> scores, once a piece
  NB+1           probabilities ready  scores -> values, once a tile; they wait for the tile before to be consumed, so
                                      that one buffer of probabilities is enough
  NB+2..2NB+1    tile consumed        values -> scores
  2NB+2          row sums ready       scores -> values, once a piece
  2NB+3          piece done           values -> scores: without it a piece of no tiles would let the scores run ahead
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


@gluon.jit
def load_tile(NOPE, ROPE, k0s, k1s, bars, buf, row):
    """Ask for the 64 latent rows from ``row`` on."""
    bar = bars.index(buf)
    mbarrier.expect(bar, 64 * 576 * 2)
    tma.async_copy_global_to_shared(NOPE, [row, 0], bar, k0s.index(buf))
    tma.async_copy_global_to_shared(ROPE, [row, 512], bar, k1s.index(buf))


@gluon.jit
def clear_tail(k0s, buf, rows):
    """Zero the latent rows from ``rows`` on: behind a sequence lies anything, and 0 * NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for c in gl.static_range(8):
        part = k0s.index(buf).slice(64 * c, 64, dim=1)
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
def score_role(
    Q_NOPE, Q_ROPE, NOPE, ROPE, q0, q1, k0s, k1s, ps, factors, sums, bars, PAGES, LENGTHS, STARTS, LSE, PART_LSE, LINE,
    BOUNDS, FIRST, splits, page_stride, scale, H: gl.constexpr, TILES: gl.constexpr, PAGE: gl.constexpr,
    FIXED: gl.constexpr,
    SINGLE: gl.constexpr, HAS_LSE: gl.constexpr, NB: gl.constexpr,
):  # fmt: skip
    """Copies, scores and softmax of every tile of this program's piece of the line."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    column_layout: gl.constexpr = gl.SliceLayout(0, mma)
    t = gl.program_id(0) % TILES
    g = gl.program_id(0) // TILES
    b, pos, end = first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED)
    start = pos
    it = 0
    piece = 0
    r = t * 64 + gl.arange(0, 64, row_layout)
    column = gl.arange(0, 64, column_layout)
    while pos < end:
        line0, line1, length = line_of(LENGTHS, LINE, b, FIXED)
        q_start, query_len = query_range(STARTS, b, SINGLE)
        stop = gl.minimum(end, line1)
        first = pos - line0
        behind = gl.minimum(stop - line0, (length + 63) // 64)
        token = r // H
        last_seen = length - query_len + gl.minimum(token, query_len - 1)
        mbarrier.expect(bars.index(NB), 64 * 576 * 2)
        tma.async_copy_global_to_shared(Q_NOPE, [q_start * H + t * 64, 0], bars.index(NB), q0)
        tma.async_copy_global_to_shared(Q_ROPE, [q_start * H + t * 64, 512], bars.index(NB), q1)
        page_row = PAGES + b.to(gl.int64) * page_stride
        PER: gl.constexpr = PAGE // 64
        for w in gl.static_range(NB - 1):  # buffers free since the tiles before it - 1 were seen consumed
            if first + w < behind:
                i = first + w
                load_tile(NOPE, ROPE, k0s, k1s, bars, (it + w) % NB, gl.load(page_row + i // PER) * PAGE + i % PER * 64)
        ahead = gl.minimum(first + NB - 1, gl.maximum(behind - 1, 0))
        row = gl.load(page_row + ahead // PER) * PAGE + ahead % PER * 64
        top = gl.full([64], float("-inf"), gl.float32, layout=row_layout)
        total = gl.zeros([64], gl.float32, layout=row_layout)
        mbarrier.wait(bars.index(NB), piece & 1)
        for i in range(first, behind):
            buf = it % NB
            mbarrier.wait(bars.index(buf), (it // NB) & 1)
            if (i + 1) * 64 > length:
                clear_tail(k0s, buf, length - i * 64)
            zero = gl.zeros([64, 64], gl.float32, layout=mma)
            s = warpgroup_mma(q0, k0s.index(buf).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma(q1, k1s.index(buf).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if it > 0:
                mbarrier.wait(bars.index(NB + 2 + (it - 1) % NB), ((it - 1) // NB) & 1)
            if i + NB - 1 < behind:
                load_tile(NOPE, ROPE, k0s, k1s, bars, (it + NB - 1) % NB, row)
                ahead = gl.minimum(i + NB, behind - 1)
                row = gl.load(page_row + ahead // PER) * PAGE + ahead % PER * 64
            s = s * scale
            s = gl.where((i * 64 + column)[None, :] <= last_seen[:, None], s, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 1))
            finite = gl.where(new_top == float("-inf"), 0.0, new_top)
            factor = gl.exp2(top - finite)
            p = gl.exp2(s - finite[:, None])
            ps.store(p.to(ps.dtype))
            factors.store(factor)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(bars.index(NB + 1), count=1)
            total = total * factor + gl.sum(p, 1)
            top = new_top
            it += 1
        if piece > 0:
            mbarrier.wait(bars.index(2 * NB + 3), (piece - 1) & 1)
        sums.store(total)
        gl.thread_barrier()
        mbarrier.arrive(bars.index(2 * NB + 2), count=1)
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
    k0s, ps, factors, sums, bars, LENGTHS, STARTS, OUT, PART_OUT, LINE, BOUNDS, FIRST, splits, out_token, out_head,
    v_scale,
    H: gl.constexpr, TILES: gl.constexpr, FIXED: gl.constexpr, SINGLE: gl.constexpr, NB: gl.constexpr,
):  # fmt: skip
    """The accumulator: probabilities times the tiles' first 512 columns, and the output."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    t = gl.program_id(0) % TILES
    g = gl.program_id(0) // TILES
    b, pos, end = first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED)
    start = pos
    it = 0
    piece = 0
    local = gl.arange(0, 64, row_layout)
    column = gl.arange(0, 512, gl.SliceLayout(0, mma))
    while pos < end:
        line0, line1, length = line_of(LENGTHS, LINE, b, FIXED)
        q_start, query_len = query_range(STARTS, b, SINGLE)
        stop = gl.minimum(end, line1)
        behind = gl.minimum(stop - line0, (length + 63) // 64)
        acc = gl.zeros([64, 512], gl.float32, layout=mma)
        for _ in range(pos - line0, behind):
            buf = it % NB
            mbarrier.wait(bars.index(NB + 1), it & 1)
            acc = acc * factors.load(row_layout)[:, None]
            acc = warpgroup_mma(ps, k0s.index(buf), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(bars.index(NB + 2 + buf), count=1)
            it += 1
        mbarrier.wait(bars.index(2 * NB + 2), piece & 1)
        total = sums.load(row_layout)
        gl.thread_barrier()
        mbarrier.arrive(bars.index(2 * NB + 3), count=1)
        acc = acc * (v_scale / gl.where(total > 0.0, total, 1.0))[:, None]
        r = t * 64 + local
        token = r // H
        live = token < query_len
        if (pos == line0) & (stop == line1):
            out_at = (q_start + token).to(gl.int64) * out_token + (r % H) * out_head
            gl.store(OUT + out_at[:, None] + column[None, :], acc.to(OUT.dtype.element_ty), mask=live[:, None])
        else:
            slot = g
            if not FIXED:
                slot = 2 * g + (pos != start).to(gl.int32)
            part_row = (slot * TILES + t) * 64 + local
            gl.store(PART_OUT + part_row.to(gl.int64)[:, None] * 512 + column[None, :], acc, mask=live[:, None])
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
):
    """Grid (groups * TILES). Q_NOPE, Q_ROPE: the queries [T * H, 576] in boxes [64, 512] and [64, 64]; NOPE, ROPE
    likewise the latent rows of all pages; PAGE a multiple of 64."""
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    dtype: gl.constexpr = Q_NOPE.dtype
    q0 = gl.allocate_shared_memory(dtype, [64, 512], Q_NOPE.layout)
    q1 = gl.allocate_shared_memory(dtype, [64, 64], Q_ROPE.layout)
    k0s = gl.allocate_shared_memory(dtype, [NB, 64, 512], NOPE.layout)
    k1s = gl.allocate_shared_memory(dtype, [NB, 64, 64], ROPE.layout)
    ps = gl.allocate_shared_memory(dtype, [64, 64], square)
    factors = gl.allocate_shared_memory(gl.float32, [64], vector)
    sums = gl.allocate_shared_memory(gl.float32, [64], vector)
    bars = gl.allocate_shared_memory(gl.int64, [2 * NB + 4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * NB + 4):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                value_role,
                (
                    k0s, ps, factors, sums, bars, LENGTHS, STARTS, OUT, PART_OUT, LINE, BOUNDS, FIRST, splits,
                    out_token,
                    out_head, v_scale, H, TILES, FIXED, SINGLE, NB,
                ),
            ),
            (
                score_role,
                (
                    Q_NOPE, Q_ROPE, NOPE, ROPE, q0, q1, k0s, k1s, ps, factors, sums, bars, PAGES, LENGTHS, STARTS, LSE,
                    PART_LSE, LINE, BOUNDS, FIRST, splits, page_stride, scale, H, TILES, PAGE, FIXED, SINGLE, HAS_LSE,
                    NB,
                ),
            ),
        ],
        [4],
        [168],
    )  # fmt: skip
