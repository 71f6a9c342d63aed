"""Extend attention for Hopper in Gluon: which rows a program takes, its shared memory, and its roles (gluon_rows.py).

STAY: there are as many programs as multiprocessors, and each takes row blocks until none is left. Its producer takes
the next one that has rows and asks for its keys while the groups are busy with the one before; it says which through
two slots, with barriers of their own. Stages are counted on over all row blocks of a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from attn_triton.kernels.gluon_rows import (
    ROWS,
    ask_queries,
    consume,
    first_scores,
    have_queries,
    produce,
    walk,
    write_rows,
)

#: Numbers that say a row block: item, request, KV head, block, first query, queries, keys, tiles.
FACTS: gl.constexpr = gl.constexpr(8)


@gluon.jit
def place_of(
    item, STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, MAPPED: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """Which row block the ``item``-th is, and what it needs: request, KV head, block, first query, queries, keys, tiles
    (0: it has no rows). The last rows of NEAR heads come first, then those before them: neighbours read the same keys,
    and what is begun last is short.
    """
    turn = item // NEAR
    h = item % NEAR + turn // blocks % (HKV // NEAR) * NEAR
    if MAPPED:
        b = gl.load(TILE_MAP + 2 * (turn % blocks))
        block = gl.load(TILE_MAP + 2 * (turn % blocks) + 1)
    else:
        b = item // (blocks * HKV)
        block = blocks - 1 - turn % blocks
    q_start = gl.load(STARTS + b)
    query_len = gl.load(STARTS + b + 1) - q_start
    length = gl.load(LENGTHS + b)
    last_token = gl.minimum((block * BM + BM - 1) // GROUP, query_len - 1)
    tiles = gl.maximum(length - query_len + last_token + BN, BN) // BN
    if block * BM >= query_len * GROUP:
        tiles = 0
    return b, h, block, q_start, query_len, length, tiles


@gluon.jit
def take(
    item, TAKEN, STARTS, LENGTHS, TILE_MAP, items, batch, blocks, HKV: gl.constexpr, GROUP: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, MAPPED: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The ``item``-th row block and what it needs, or of those after it that this program takes the first with rows."""
    b, h, block, q_start, query_len, length, tiles = place_of(
        gl.minimum(item, items - 1), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, NEAR
    )
    while (item < items) & (tiles == 0):
        item = gl.num_programs(0) + gl.atomic_add(TAKEN, 1)
        b, h, block, q_start, query_len, length, tiles = place_of(
            gl.minimum(item, items - 1), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, NEAR
        )
    return item, b, h, block, q_start, query_len, length, tiles


@gluon.jit
def tell(turn, facts, slots, told, heard):
    """Say to both groups which row block is the ``turn``-th of this program."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = turn % 2
    mbarrier.wait(heard.index(slot), ((turn // 2) & 1) ^ 1)
    for i in gl.static_range(FACTS):
        slots.index(slot * FACTS + i).store(gl.full([1], facts[i], gl.int32, one))
    gl.thread_barrier()
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def hear(turn, slots, told, heard):
    """What `tell` says: item, request, KV head, block, first query, queries, keys, tiles."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = turn % 2
    mbarrier.wait(told.index(slot), (turn // 2) & 1)
    facts = (gl.max(slots.index(slot * FACTS).load(one), 0),)
    for i in gl.static_range(1, FACTS):
        fact = gl.max(slots.index(slot * FACTS + i).load(one), 0)
        facts = facts + (fact,)  # type: ignore[assignment]  # noqa: RUF005
    gl.thread_barrier()
    mbarrier.arrive(heard.index(slot), count=1)
    return facts


@gluon.jit
def keep_producing(
    K_POOL, V_POOL, PAGES, LENGTHS, STARTS, TILE_MAP, TAKEN, items, batch, blocks, page_stride, k_boxes, v_boxes,
    k_full,
    v_full, k_free, v_free, slots, told, heard, HKV: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr, ROWS_PAGE: gl.constexpr,
    ROWS_HEAD: gl.constexpr, COLUMNS_HEAD: gl.constexpr, MAPPED: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """The producer warp of a program that stays: takes row blocks, tells the groups, asks for their tiles. Groups hear
    of the next one when they begin one, so it is taken as soon as the first tile of that one is asked for. TAKEN [2]:
    row blocks taken beyond the first of each program, and programs that are through; both are 0 again at the end.
    """
    item, b, h, block, q_start, query_len, length, tiles = take(
        gl.program_id(0), TAKEN, STARTS, LENGTHS, TILE_MAP, items, batch, blocks, HKV, GROUP, BM, BN, MAPPED, NEAR
    )
    tell(0, (item, b, h, block, q_start, query_len, length, tiles), slots, told, heard)
    count = 0
    turn = 1
    while item < items:
        page_row = PAGES + b.to(gl.int64) * page_stride
        last_page = gl.maximum(length - 1, 0) // PAGE
        produce(
            K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, count, 0, 1, last_page,
            h * ROWS_HEAD, h * COLUMNS_HEAD, BN // BOX, BOX, BN, PAGE, ROWS_PAGE, STAGES,
        )  # fmt: skip
        row, column, end, before = h * ROWS_HEAD, h * COLUMNS_HEAD, tiles, count
        item, b, h, block, q_start, query_len, length, tiles = take(
            gl.num_programs(0) + gl.atomic_add(TAKEN, 1), TAKEN, STARTS, LENGTHS, TILE_MAP, items, batch, blocks, HKV,
            GROUP, BM, BN, MAPPED, NEAR,
        )  # fmt: skip
        tell(turn, (item, b, h, block, q_start, query_len, length, tiles), slots, told, heard)
        turn += 1
        produce(
            K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, before, 1, end, last_page, row,
            column, BN // BOX, BOX, BN, PAGE, ROWS_PAGE, STAGES,
        )  # fmt: skip
        count += end
    through = gl.atomic_add(TAKEN + 1, 1)
    if through == gl.num_programs(0) - 1:
        gl.store(TAKEN, 0)
        gl.store(TAKEN + 1, 0)


@gluon.jit
def keep_consuming(
    Q, OUT, LSE, STARTS, items, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free, cleared, slots, told, heard,
    q_token, q_head, out_token, out_head, scale, v_scale, WHICH: gl.constexpr, HKV: gl.constexpr, GROUP: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, HAS_LSE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One group of a program that stays: the row blocks that its producer takes. While it is busy with one, the queries
    of the next come into the other half of ``q_tiles`` [4, ROWS, 128]; its first scores are under way while the rows
    of the one before are written.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    item, b, h, block, q_start, query_len, length, tiles = hear(0, slots, told, heard)
    first = (block * 2 + WHICH) * ROWS
    q = q_tiles.index(WHICH)
    ask_queries(Q, q, h, first, q_start, query_len, q_token, q_head, GROUP, UNIT, flat)
    have_queries(UNIT)
    s = warpgroup_mma_wait(0, deps=(first_scores(q, k_tiles, k_full, 0, item < items, BN, STAGES, mma),))
    count = 0
    tails = 0
    turn = 1
    while item < items:
        gl.thread_barrier()
        mbarrier.arrive(k_free.index(count % STAGES), count=1)
        then, then_b, then_h, then_block, q_start, then_len, then_length, then_tiles = hear(turn, slots, told, heard)
        then_first = (then_block * 2 + WHICH) * ROWS
        then_q = q_tiles.index(turn % 2 * 2 + WHICH)
        ask_queries(Q, then_q, then_h, then_first, q_start, then_len, q_token, q_head, GROUP, UNIT, flat)
        acc, top, total = walk(
            s, q_tiles.index((turn + 1) % 2 * 2 + WHICH), k_tiles, v_tiles, k_full, v_full, k_free, v_free, cleared,
            first, length - query_len, length, count, tails, tiles, scale, WHICH, GROUP, BN, STAGES, mma,
        )  # fmt: skip
        have_queries(UNIT)
        o = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(v_free.index((count + tiles - 1) % STAGES), count=1)
        count += tiles
        tails += (tiles * BN > length).to(gl.int32)
        under_way = first_scores(then_q, k_tiles, k_full, count, then < items, BN, STAGES, mma)
        write_rows(
            OUT, LSE, STARTS, o, top, total, b, h, first, query_len, out_token, out_head, v_scale, GROUP, HKV * GROUP,
            HAS_LSE, UNIT, mma, flat,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=(under_way,))
        turn += 1
        item, b, h, first, query_len, length, tiles = (
            then,
            then_b,
            then_h,
            then_first,
            then_len,
            then_length,
            then_tiles,
        )


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
    NEAR: gl.constexpr,
    HAS_LSE: gl.constexpr,
    UNIT: gl.constexpr,
    STAY: gl.constexpr,
):
    """Grid (row blocks of all requests * HKV), MAPPED through TILE_MAP [blocks, 2] (request, block) or ``blocks`` for
    each of ``batch``. A pool is rows of 128: token t of page p for head h is row
    p * ROWS_PAGE + h * ROWS_HEAD + t, from column h * COLUMNS_HEAD on, read in boxes [BOX, 64] that lie in one page.
    """
    b, h, block, q_start, query_len, length, tiles = place_of(
        gl.program_id(0), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, NEAR
    )
    BOXES: gl.constexpr = BN // BOX
    if STAY or tiles > 0:
        swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        dtype: gl.constexpr = K_POOL.dtype
        q_tiles = gl.allocate_shared_memory(dtype, [4 if STAY else 2, ROWS, 128], swizzled)
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
            slots = gl.allocate_shared_memory(gl.int32, [2 * FACTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
                            Q, OUT, LSE, STARTS, items, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free,
                            cleared, slots, told, heard, q_token, q_head, out_token, out_head, scale, v_scale, 0, HKV,
                            GROUP, BN, STAGES, HAS_LSE, UNIT,
                        ),
                    ),
                    (
                        keep_consuming,
                        (
                            Q, OUT, LSE, STARTS, items, q_tiles, k_tiles, v_tiles, k_full, v_full, k_free, v_free,
                            cleared, slots, told, heard, q_token, q_head, out_token, out_head, scale, v_scale, 1, HKV,
                            GROUP, BN, STAGES, HAS_LSE, UNIT,
                        ),
                    ),
                    (
                        keep_producing,
                        (
                            K_POOL, V_POOL, PAGES, LENGTHS, STARTS, TILE_MAP, TAKEN, items, batch, blocks, page_stride,
                            k_boxes, v_boxes, k_full, v_full, k_free, v_free, slots, told, heard, HKV, GROUP, BM, BN,
                            STAGES,
                            BOX, PAGE, ROWS_PAGE, ROWS_HEAD, COLUMNS_HEAD, MAPPED, NEAR,
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
                            K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, 0, 0, tiles,
                            gl.maximum(length - 1, 0) // PAGE, h * ROWS_HEAD, h * COLUMNS_HEAD, BOXES, BOX, BN, PAGE,
                            ROWS_PAGE, STAGES,
                        ),
                    ),
                ],
                [4, 1],
                [240, 24],
            )  # fmt: skip
