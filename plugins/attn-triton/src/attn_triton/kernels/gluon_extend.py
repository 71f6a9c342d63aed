"""Extend attention for Hopper in Gluon: one producer warp brings pages by the copy engine, eight warps compute.

A program holds BM query rows, (token, head of a KV head's group), and walks tiles of BN keys. A tile is BN / BOX boxes
of BOX tokens, which lie in one page each, times two halves of the 128-wide head; all of them land in one swizzled tile
of shared memory. The product with the values of tile i runs while the scores of tile i + 1 are computed.

Barriers, one a stage each: keys full, values full (copy engine -> consumer); keys free,
values free (consumer -> producer).
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
def clear_tail(v_tiles, stage, rows, BN: gl.constexpr, WARPS: gl.constexpr):
    """Zero the values from ``rows`` on: behind a sequence lies anything, and 0 * NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    r = gl.arange(0, BN, gl.SliceLayout(1, layout))
    for half in gl.static_range(2):
        part = v_tiles.index(2 * stage + half)
        x = part.load(layout)
        part.store(gl.where((r < rows)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def run_tiles(
    acc0, acc1, top, total, q_s, k_tiles, v_tiles, k_full, v_full, k_free, v_free, begin, end, length, last_seen, scale,
    MASKED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """Tiles ``begin``..``end``. The accumulators come in and go out with their last product still under way."""
    for i in range(begin, end):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        zero = gl.zeros([BM, BN], gl.float32, mma)
        s = warpgroup_mma(q_s.index(0), k_tiles.index(2 * stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma(q_s.index(1), k_tiles.index(2 * stage + 1).permute((1, 0)), s, is_async=True)
        s, a0, a1 = warpgroup_mma_wait(0, deps=(s, acc0, acc1))
        gl.thread_barrier()  # all warps have read the keys of this tile, and the values of the one before
        mbarrier.arrive(k_free.index(stage), count=1)
        mbarrier.arrive(v_free.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        if MASKED:
            n = i * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
            s = gl.where(n[None, :] <= last_seen[:, None], s, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - new_top[:, None])
        factor = gl.exp2(top - new_top)
        total = total * factor + gl.sum(p, 1)
        top = new_top
        p = gl.convert_layout(p.to(v_tiles.dtype), gl.DotOperandLayout(0, mma, 2))
        a0 = a0 * factor[:, None]
        a1 = a1 * factor[:, None]
        mbarrier.wait(v_full.index(stage), phase)
        if MASKED:
            if (i + 1) * BN > length:
                clear_tail(v_tiles, stage, length - i * BN, BN, WARPS)
        acc0 = warpgroup_mma(p, v_tiles.index(2 * stage), a0, is_async=True)
        acc1 = warpgroup_mma(p, v_tiles.index(2 * stage + 1), a1, is_async=True)
    return acc0, acc1, top, total


@gluon.jit
def consume(
    Q, OUT, LSE, STARTS, b, h, block, q_start, query_len, prefix, length, q_s, k_tiles, v_tiles, k_full, v_full, k_free,
    v_free, full, tiles, q_token, q_head, out_token, out_head, scale, v_scale, GROUP: gl.constexpr, HEADS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, HAS_LSE: gl.constexpr,
):  # fmt: skip
    """The eight warps that compute: queries to shared memory, all tiles, the output."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 64, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    rows = block * BM + gl.arange(0, BM, gl.SliceLayout(1, flat))
    token = rows // GROUP
    column = gl.arange(0, 64, gl.SliceLayout(0, flat))
    live = token < query_len
    q_at = (q_start + token).to(gl.int64) * q_token + (h * GROUP + rows % GROUP) * q_head
    q_at = q_at[:, None] + column[None, :]
    q_s.index(0).store(gl.load(Q + q_at, mask=live[:, None], other=0.0))
    q_s.index(1).store(gl.load(Q + q_at + 64, mask=live[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    m_rows = block * BM + gl.arange(0, BM, row_layout)
    last_seen = gl.minimum(prefix + m_rows // GROUP, length - 1)
    top = gl.full([BM], float("-inf"), gl.float32, row_layout)
    total = gl.full([BM], 0.0, gl.float32, row_layout)
    acc0 = warpgroup_mma_init(gl.zeros([BM, 64], gl.float32, mma))
    acc1 = warpgroup_mma_init(gl.zeros([BM, 64], gl.float32, mma))
    acc0, acc1, top, total = run_tiles(
        acc0, acc1, top, total, q_s, k_tiles, v_tiles, k_full, v_full, k_free, v_free, 0, full, length, last_seen,
        scale,
        False, BM, BN, STAGES, WARPS, mma,
    )  # fmt: skip
    acc0, acc1, top, total = run_tiles(
        acc0, acc1, top, total, q_s, k_tiles, v_tiles, k_full, v_full, k_free, v_free, full, tiles, length, last_seen,
        scale,
        True, BM, BN, STAGES, WARPS, mma,
    )  # fmt: skip
    o0, o1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    inverse = v_scale / gl.where(total > 0.0, total, 1.0)
    # Read again, volatile, so that the row offsets are computed again and hold no registers across the loops.
    q_start = gl.load(STARTS + b, volatile=True)
    out_at = (q_start + token).to(gl.int64) * out_token + (h * GROUP + rows % GROUP) * out_head
    out_at = out_at[:, None] + column[None, :]
    gl.store(
        OUT + out_at, gl.convert_layout((o0 * inverse[:, None]).to(OUT.dtype.element_ty), flat), mask=live[:, None]
    )
    gl.store(
        OUT + out_at + 64, gl.convert_layout((o1 * inverse[:, None]).to(OUT.dtype.element_ty), flat), mask=live[:, None]
    )
    if HAS_LSE:
        base2 = gl.where(total > 0.0, top + gl.log2(gl.where(total > 0.0, total, 1.0)), float("-inf"))
        lse_at = (q_start + m_rows // GROUP) * HEADS + h * GROUP + m_rows % GROUP
        gl.store(LSE + lse_at, base2 * 0.6931471805599453, mask=m_rows // GROUP < query_len)


@gluon.jit(
    do_not_specialize=[
        "K_POOL", "V_POOL", "batch", "blocks", "q_token", "q_head", "out_token", "out_head", "page_stride", "scale",
        "v_scale",
    ]
)  # fmt: skip
def gluon_extend_kernel(
    Q,
    K_POOL,
    V_POOL,
    PAGES,
    LENGTHS,
    STARTS,
    OUT,
    LSE,
    TILE_MAP,
    batch,
    blocks,
    q_token,
    q_head,
    out_token,
    out_head,
    page_stride,
    scale,
    v_scale,
    HKV: gl.constexpr,
    GROUP: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    PAGE: gl.constexpr,
    BOX: gl.constexpr,
    ROWS_PAGE: gl.constexpr,
    ROWS_HEAD: gl.constexpr,
    COLUMNS_HEAD: gl.constexpr,
    MAPPED: gl.constexpr,
    BY_HEAD: gl.constexpr,
    HAS_LSE: gl.constexpr,
):
    """Grid as that of kernels/extend.py. A pool is rows of 128: token t of page p for head h is row
    p * ROWS_PAGE + h * ROWS_HEAD + t, from column h * COLUMNS_HEAD on, read in boxes [BOX, 64] that lie in one page.
    """
    pid = gl.program_id(0)
    if MAPPED:
        if BY_HEAD:
            h = pid // blocks
            entry = pid % blocks
        else:
            h = pid % HKV
            entry = pid // HKV
        b = gl.load(TILE_MAP + 2 * entry)
        block = gl.load(TILE_MAP + 2 * entry + 1)
    elif BY_HEAD:
        block = blocks - 1 - pid % blocks
        h = pid // blocks % HKV
        b = pid // (blocks * HKV)
    else:
        block = blocks - 1 - pid // (batch * HKV)
        h = pid % HKV
        b = pid % (batch * HKV) // HKV
    q_start = gl.load(STARTS + b)
    query_len = gl.load(STARTS + b + 1) - q_start
    length = gl.load(LENGTHS + b)
    BOXES: gl.constexpr = BN // BOX
    if block * BM < query_len * GROUP:
        prefix = length - query_len
        first_token = block * BM // GROUP
        last_token = gl.minimum((block * BM + BM - 1) // GROUP, query_len - 1)
        tiles = gl.maximum(prefix + last_token + BN, 0) // BN
        full = gl.minimum(gl.maximum(prefix + first_token + 1, 0) // BN, tiles)
        last_page = gl.maximum(length - 1, 0) // PAGE
        page_row = PAGES + b.to(gl.int64) * page_stride
        swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        dtype: gl.constexpr = K_POOL.dtype
        q_s = gl.allocate_shared_memory(dtype, [2, BM, 64], swizzled)
        k_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, BN, 64], swizzled)
        v_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, BN, 64], swizzled)
        k_boxes = k_tiles._reinterpret(dtype, [2 * STAGES * BOXES, BOX, 64], swizzled)
        v_boxes = v_tiles._reinterpret(dtype, [2 * STAGES * BOXES, BOX, 64], swizzled)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_full.index(stage), count=1)
            mbarrier.init(v_full.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=1)
            mbarrier.init(v_free.index(stage), count=1)
        fence_async_shared()
        gl.thread_barrier()
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        Q, OUT, LSE, STARTS, b, h, block, q_start, query_len, prefix, length, q_s, k_tiles, v_tiles,
                        k_full, v_full, k_free, v_free, full, tiles, q_token, q_head, out_token, out_head, scale,
                        v_scale, GROUP, HKV * GROUP, BM, BN, STAGES, WARPS, HAS_LSE,
                    ),
                ),
                (
                    produce,
                    (
                        K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, tiles, last_page,
                        h * ROWS_HEAD, h * COLUMNS_HEAD, BOXES, BOX, BN, PAGE, ROWS_PAGE, STAGES,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
