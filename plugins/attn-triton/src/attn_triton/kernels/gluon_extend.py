"""Extend attention for Hopper in Gluon: which rows a program takes, its shared memory, and its roles (gluon_rows.py).

STAY: there are as many programs as multiprocessors, and each takes row blocks until none is left. Its producer takes
the next one that has rows and asks for its keys while the groups are busy with the one before; it says which through
two slots, with barriers of their own. Stages are counted on over all row blocks of a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from attn_triton.kernels.gluon_rows import ROWS, bring_queries, consume, produce, walk, write_rows


@gluon.jit
def place_of(
    item, STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, MAPPED: gl.constexpr, BY_HEAD: gl.constexpr,
):  # fmt: skip
    """Which row block the ``item``-th is, and what it needs: request, KV head, block, first query, queries, keys, tiles
    (0: it has no rows).
    """
    if MAPPED:
        if BY_HEAD:
            h = item // blocks
            entry = item % blocks
        else:
            h = item % HKV
            entry = item // HKV
        b = gl.load(TILE_MAP + 2 * entry)
        block = gl.load(TILE_MAP + 2 * entry + 1)
    elif BY_HEAD:
        block = blocks - 1 - item % blocks
        h = item // blocks % HKV
        b = item // (blocks * HKV)
    else:
        block = blocks - 1 - item // (batch * HKV)
        h = item % HKV
        b = item % (batch * HKV) // HKV
    q_start = gl.load(STARTS + b)
    query_len = gl.load(STARTS + b + 1) - q_start
    length = gl.load(LENGTHS + b)
    last_token = gl.minimum((block * BM + BM - 1) // GROUP, query_len - 1)
    tiles = gl.maximum(length - query_len + last_token + BN, BN) // BN
    if block * BM >= query_len * GROUP:
        tiles = 0
    return b, h, block, q_start, query_len, length, tiles


@gluon.jit
def keep_producing(
    K_POOL, V_POOL, PAGES, LENGTHS, STARTS, TILE_MAP, TAKEN, items, batch, blocks, page_stride, k_boxes, v_boxes,
    k_full,
    v_full, k_free, v_free, slots, told, heard, HKV: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr, ROWS_PAGE: gl.constexpr,
    ROWS_HEAD: gl.constexpr, COLUMNS_HEAD: gl.constexpr, MAPPED: gl.constexpr, BY_HEAD: gl.constexpr,
):  # fmt: skip
    """The producer warp of a program that stays: takes row blocks, tells the groups, asks for their tiles. TAKEN [2]:
    row blocks taken beyond the first of each program, and programs that are through; both are 0 again at the end.
    """
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    item = gl.program_id(0)
    count = 0
    turn = 0
    more = item >= 0
    while more:
        b, h, _, _, _, length, tiles = place_of(
            gl.minimum(item, items - 1), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, BY_HEAD
        )
        more = item < items
        if tiles > 0 or not more:
            mbarrier.wait(heard.index(turn % 2), ((turn // 2) & 1) ^ 1)
            slots.index(turn % 2).store(gl.full([1], item, gl.int32, one))
            gl.thread_barrier()
            mbarrier.arrive(told.index(turn % 2), count=1)
            turn += 1
        if more:
            produce(
                K_POOL, V_POOL, PAGES + b.to(gl.int64) * page_stride, k_boxes, v_boxes, k_full, v_full, k_free, v_free,
                count, tiles, gl.maximum(length - 1, 0) // PAGE, h * ROWS_HEAD, h * COLUMNS_HEAD, BN // BOX, BOX, BN,
                PAGE, ROWS_PAGE, STAGES,
            )  # fmt: skip
            count += tiles
            item = gl.num_programs(0) + gl.atomic_add(TAKEN, 1)
    through = gl.atomic_add(TAKEN + 1, 1)
    if through == gl.num_programs(0) - 1:
        gl.store(TAKEN, 0)
        gl.store(TAKEN + 1, 0)


@gluon.jit
def hear(slots, told, heard, turn):
    """The row block that the producer says next; one behind the last when there is none left."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(told.index(turn % 2), (turn // 2) & 1)
    item = gl.max(slots.index(turn % 2).load(one), 0)
    gl.thread_barrier()
    mbarrier.arrive(heard.index(turn % 2), count=1)
    return item


@gluon.jit
def keep_consuming(
    Q, OUT, LSE, STARTS, LENGTHS, TILE_MAP, items, batch, blocks, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free,
    v_free, cleared, slots, told, heard, q_token, q_head, out_token, out_head, scale, v_scale, WHICH: gl.constexpr,
    HKV: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    MAPPED: gl.constexpr, BY_HEAD: gl.constexpr, HAS_LSE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One group of a program that stays: the row blocks that its producer takes. The queries of the next one are
    brought while the last product of the one before is under way.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    q = q_tiles.index(WHICH)
    item = hear(slots, told, heard, 0)
    b, h, block, q_start, query_len, length, tiles = place_of(
        gl.minimum(item, items - 1), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, BY_HEAD
    )
    first = (block * 2 + WHICH) * ROWS
    bring_queries(Q, q, h, first, q_start, query_len, q_token, q_head, GROUP, UNIT, flat)
    count = 0
    tails = 0
    turn = 1
    while item < items:
        acc, top, total = walk(
            q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, cleared, first, length - query_len, length, count,
            tails, tiles, scale, WHICH, GROUP, BN, STAGES, mma,
        )  # fmt: skip
        count += tiles
        tails += (tiles * BN > length).to(gl.int32)
        item = hear(slots, told, heard, turn)
        turn += 1
        done_b, done_h, done_first, done_len = b, h, first, query_len
        b, h, block, q_start, query_len, length, tiles = place_of(
            gl.minimum(item, items - 1), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, BY_HEAD
        )
        first = (block * 2 + WHICH) * ROWS
        bring_queries(Q, q, h, first, q_start, query_len, q_token, q_head, GROUP, UNIT, flat)
        o = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(v_free.index((count - 1) % STAGES), count=1)
        write_rows(
            OUT, LSE, STARTS, o, top, total, done_b, done_h, done_first, done_len, out_token, out_head, v_scale, GROUP,
            HKV * GROUP, HAS_LSE, UNIT, mma, flat,
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "K_POOL", "V_POOL", "items", "batch", "blocks", "q_token", "q_head", "out_token", "out_head", "page_stride",
        "scale", "v_scale",
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
    TAKEN,
    items,
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
    PAGE: gl.constexpr,
    BOX: gl.constexpr,
    ROWS_PAGE: gl.constexpr,
    ROWS_HEAD: gl.constexpr,
    COLUMNS_HEAD: gl.constexpr,
    MAPPED: gl.constexpr,
    BY_HEAD: gl.constexpr,
    HAS_LSE: gl.constexpr,
    UNIT: gl.constexpr,
    STAY: gl.constexpr,
):
    """Grid as that of kernels/extend.py. A pool is rows of 128: token t of page p for head h is row
    p * ROWS_PAGE + h * ROWS_HEAD + t, from column h * COLUMNS_HEAD on, read in boxes [BOX, 64] that lie in one page.
    """
    b, h, block, q_start, query_len, length, tiles = place_of(
        gl.program_id(0), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, BY_HEAD
    )
    BOXES: gl.constexpr = BN // BOX
    if STAY or tiles > 0:
        swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        dtype: gl.constexpr = K_POOL.dtype
        q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, 128], swizzled)
        k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BN, 128], swizzled)
        v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BN, 128], swizzled)
        k_boxes = k_tiles._reinterpret(dtype, [2 * STAGES * BOXES, BOX, 64], swizzled)
        v_boxes = v_tiles._reinterpret(dtype, [2 * STAGES * BOXES, BOX, 64], swizzled)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        cleared = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_full.index(stage), count=1)
            mbarrier.init(v_full.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        for turn in gl.static_range(2):
            mbarrier.init(cleared.index(turn), count=1)
        if STAY:
            slots = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
            heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
            for slot in gl.static_range(2):
                mbarrier.init(told.index(slot), count=1)
                mbarrier.init(heard.index(slot), count=2)
            fence_async_shared()
            gl.thread_barrier()
            gl.warp_specialize(
                [
                    (
                        keep_consuming,
                        (
                            Q, OUT, LSE, STARTS, LENGTHS, TILE_MAP, items, batch, blocks, q_tiles, k_tiles, v_tiles,
                            k_full,
                            v_full, k_free, v_free, cleared, slots, told, heard, q_token, q_head, out_token, out_head,
                            scale,
                            v_scale, 0, HKV, GROUP, BM, BN, STAGES, MAPPED, BY_HEAD, HAS_LSE, UNIT,
                        ),
                    ),
                    (
                        keep_consuming,
                        (
                            Q, OUT, LSE, STARTS, LENGTHS, TILE_MAP, items, batch, blocks, q_tiles, k_tiles, v_tiles,
                            k_full,
                            v_full, k_free, v_free, cleared, slots, told, heard, q_token, q_head, out_token, out_head,
                            scale,
                            v_scale, 1, HKV, GROUP, BM, BN, STAGES, MAPPED, BY_HEAD, HAS_LSE, UNIT,
                        ),
                    ),
                    (
                        keep_producing,
                        (
                            K_POOL, V_POOL, PAGES, LENGTHS, STARTS, TILE_MAP, TAKEN, items, batch, blocks, page_stride,
                            k_boxes, v_boxes, k_full, v_full, k_free, v_free, slots, told, heard, HKV, GROUP, BM, BN,
                            STAGES,
                            BOX, PAGE, ROWS_PAGE, ROWS_HEAD, COLUMNS_HEAD, MAPPED, BY_HEAD,
                        ),
                    ),
                ],
                [4, 1],
                [240, 24],
            )  # fmt: skip
        else:
            fence_async_shared()
            gl.thread_barrier()
            prefix = length - query_len
            page_row = PAGES + b.to(gl.int64) * page_stride
            gl.warp_specialize(
                [
                    (
                        consume,
                        (
                            Q, OUT, LSE, STARTS, b, h, block, q_start, query_len, prefix, length, q_tiles, k_tiles,
                            v_tiles,
                            k_full, v_full, k_free, v_free, cleared, tiles, q_token, q_head, out_token, out_head,
                            scale, v_scale, 0, GROUP, HKV * GROUP, BN, STAGES, HAS_LSE, UNIT,
                        ),
                    ),
                    (
                        consume,
                        (
                            Q, OUT, LSE, STARTS, b, h, block, q_start, query_len, prefix, length, q_tiles, k_tiles,
                            v_tiles,
                            k_full, v_full, k_free, v_free, cleared, tiles, q_token, q_head, out_token, out_head,
                            scale, v_scale, 1, GROUP, HKV * GROUP, BN, STAGES, HAS_LSE, UNIT,
                        ),
                    ),
                    (
                        produce,
                        (
                            K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, 0, tiles,
                            gl.maximum(length - 1, 0) // PAGE, h * ROWS_HEAD, h * COLUMNS_HEAD, BOXES, BOX, BN, PAGE,
                            ROWS_PAGE, STAGES,
                        ),
                    ),
                ],
                [4, 1],
                [240, 24],
            )  # fmt: skip
