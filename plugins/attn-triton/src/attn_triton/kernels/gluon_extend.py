"""Extend attention for Hopper in Gluon: the rows of a program, its shared memory, and its roles (gluon_rows.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from attn_triton.kernels.gluon_rows import ROWS, consume, produce


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


@gluon.jit(
    do_not_specialize=[
        "K_POOL", "V_POOL", "batch", "blocks", "q_token", "q_head", "out_token", "out_head", "page_stride",
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
):
    """Grid (row blocks of all requests * HKV), MAPPED through TILE_MAP [blocks, 2] (request, block) or ``blocks`` for
    each of ``batch``. A pool is rows of 128: token t of page p for head h is row
    p * ROWS_PAGE + h * ROWS_HEAD + t, from column h * COLUMNS_HEAD on, read in boxes [BOX, 64] that lie in one page.
    """
    b, h, block, q_start, query_len, length, tiles = place_of(
        gl.program_id(0), STARTS, LENGTHS, TILE_MAP, batch, blocks, HKV, GROUP, BM, BN, MAPPED, NEAR
    )
    BOXES: gl.constexpr = BN // BOX
    if tiles > 0:
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
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        cleared = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_full.index(stage), count=1)
            mbarrier.init(v_full.index(stage), count=1)
            mbarrier.init(k_free.index(stage), count=2)
            mbarrier.init(v_free.index(stage), count=2)
        mbarrier.init(turns.index(0), count=1)
        mbarrier.init(turns.index(1), count=1)
        mbarrier.init(cleared.index(0), count=1)
        fence_async_shared()
        gl.thread_barrier()
        prefix = length - query_len
        page_row = PAGES + b.to(gl.int64) * page_stride
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        Q, OUT, LSE, h, block, q_start, query_len, prefix, length, q_tiles, k_tiles, v_tiles, k_full,
                        v_full, k_free, v_free, turns, cleared, tiles, q_token, q_head, out_token, out_head, scale,
                        v_scale, 0, GROUP, HKV * GROUP, BN, STAGES, HAS_LSE, UNIT,
                    ),
                ),
                (
                    consume,
                    (
                        Q, OUT, LSE, h, block, q_start, query_len, prefix, length, q_tiles, k_tiles, v_tiles, k_full,
                        v_full, k_free, v_free, turns, cleared, tiles, q_token, q_head, out_token, out_head, scale,
                        v_scale, 1, GROUP, HKV * GROUP, BN, STAGES, HAS_LSE, UNIT,
                    ),
                ),
                (
                    produce,
                    (
                        K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, tiles,
                        gl.maximum(length - 1, 0) // PAGE, h * ROWS_HEAD, h * COLUMNS_HEAD, BOXES, BOX, BN, PAGE,
                        ROWS_PAGE, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
