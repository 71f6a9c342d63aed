"""What a program of the extend kernel for Hopper does for one block of rows: one producer warp brings pages by the copy
engine, two groups of four warps compute.

A program holds 2 x 64 query rows, (token, head of a KV head's group), and walks tiles of BN keys, which both groups
read. A tile is BN / BOX boxes of BOX tokens, which lie in one page each, times two halves of the 128-wide head; all of
them land in one swizzled tile of shared memory. A group issues the scores of tile i, then the values of tile i - 1, and
does the softmax of the one while the tensor cores work on the other; the two groups never wait for each other but
through the tiles.

Barriers, one a stage each: keys full, values full (copy engine -> groups); keys free, values free (both groups ->
producer). Two more, in turn, say that group 0 has cleared what lies behind a sequence: it may be two tails ahead of
group 1, since the stages let it be two tiles ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    K_POOL, V_POOL, page_row, k_boxes, v_boxes, k_full, v_full, k_free, v_free, before, begin, end, last_page,
    first_row, column,
    BOXES: gl.constexpr, BOX: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr, ROWS_PAGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: pages of tiles ``begin``..``end``, keys before values. ``before``: tiles that the program had
    before tile 0.
    """
    for i in range(begin, end):
        stage = (before + i) % STAGES
        phase = ((before + i) // STAGES) & 1
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
def run_tiles(
    p, acc, top, total, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, count, begin, end, tiles,
    last_seen, scale, MASKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Tiles ``begin``..``end`` (begin > 0) of ``tiles``. ``p`` are the probabilities of the tile before, whose values
    are not in ``acc`` yet. The keys of the first tile are here; so will be those of tile ``end``. ``count``: tiles that
    the program had before tile 0.
    """
    for i in range(begin, end):
        stage = (count + i) % STAGES
        before = (count + i - 1) % STAGES
        zero = gl.zeros([ROWS, BN], gl.float32, mma)
        s = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((count + i - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        gl.thread_barrier()
        mbarrier.arrive(k_free.index(stage), count=1)
        p, factor, top, total = fold(s, top, total, i, last_seen, scale, MASKED, BN, mma, v_tiles.dtype)
        # A wait is a branch, over which ptxas does not pull the wait for the values: it would come before the softmax.
        after = count + i + 1
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=i + 1 < tiles)
        a = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(v_free.index(before), count=1)
        acc = warpgroup_mma_init(a * factor[:, None])
    return p, acc, top, total


@gluon.jit
def ask_queries(
    Q, q, h, first, q_start, query_len, q_token, q_head, GROUP: gl.constexpr, UNIT: gl.constexpr, flat: gl.constexpr
):  # fmt: skip
    """Ask for the ROWS rows from ``first`` on, for shared memory, zeros where there are none: `have_queries` waits."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    token = rows // GROUP
    column = gl.arange(0, 128, gl.SliceLayout(0, flat))
    q_at = ((q_start + token).to(gl.int64) * q_token + (h * GROUP + rows % GROUP) * q_head) * UNIT
    live = (token < query_len)[:, None]
    if UNIT == 1:  # 2 bytes at a time, which no asynchronous copy does
        q.store(gl.load(Q + q_at[:, None] + column[None, :], mask=live, other=0.0))
    else:
        async_copy.async_copy_global_to_shared(q, Q + q_at[:, None] + column[None, :], mask=live)
        async_copy.commit_group()


@gluon.jit
def have_queries(UNIT: gl.constexpr):
    """The rows that were asked for are here, for the tensor cores and for all warps of the group."""
    if UNIT != 1:
        async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def first_scores(q, k_tiles, k_full, count, there, BN: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr):
    """Scores of tile 0 under way, once its keys are here. Not ``there``: of whatever lies in shared memory."""
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1, pred=there)
    zero = gl.zeros([ROWS, BN], gl.float32, mma)
    return warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def walk(
    s, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, cleared, first, prefix, length, count, tails, tiles, scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """All tiles of the rows from ``first`` on, with the scores ``s`` of tile 0: what their values add up to, with the
    last product under way, and their running softmax. ``count``: tiles that the program had already; ``tails``: how
    many times it cleared a tail.
    """
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    last_seen = gl.minimum(prefix + (first + gl.arange(0, ROWS, row_layout)) // GROUP, length - 1)
    full = gl.minimum(gl.maximum(prefix + first // GROUP + 1, 0) // BN, tiles)
    top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = warpgroup_mma_init(gl.zeros([ROWS, 128], gl.float32, mma))
    p, _, top, total = fold(s, top, total, 0, last_seen, scale, True, BN, mma, v_tiles.dtype)
    mbarrier.wait(k_full.index((count + 1) % STAGES), (count + 1) // STAGES & 1, pred=tiles > 1)
    full = gl.maximum(full, 1)
    p, acc, top, total = run_tiles(
        p, acc, top, total, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, count, 1, full, tiles,
        last_seen, scale, False, BN, STAGES, mma,
    )  # fmt: skip
    p, acc, top, total = run_tiles(
        p, acc, top, total, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, count, full, tiles, tiles,
        last_seen, scale, True, BN, STAGES, mma,
    )  # fmt: skip
    last = (count + tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((count + tiles - 1) // STAGES) & 1)
    if tiles * BN > length:
        if WHICH == 0:
            clear_tail(v_tiles.index(last), length - (tiles - 1) * BN, BN)
            mbarrier.arrive(cleared.index(tails % 2), count=1)
        else:
            mbarrier.wait(cleared.index(tails % 2), (tails // 2) & 1)
    return warpgroup_mma(p, v_tiles.index(last), acc, is_async=True), top, total


@gluon.jit
def write_rows(
    OUT, LSE, STARTS, o, top, total, b, h, first, query_len, out_token, out_head, v_scale, GROUP: gl.constexpr,
    HEADS: gl.constexpr, HAS_LSE: gl.constexpr, UNIT: gl.constexpr, mma: gl.constexpr, flat: gl.constexpr,
):  # fmt: skip
    """The rows from ``first`` on, and their log of sums."""
    inverse = v_scale / gl.where(total > 0.0, total, 1.0)
    # Read again, volatile, so that the row offsets are computed again and hold no registers across the loops.
    q_start = gl.load(STARTS + b, volatile=True)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    token = rows // GROUP
    column = gl.arange(0, 128, gl.SliceLayout(0, flat))
    out_at = ((q_start + token).to(gl.int64) * out_token + (h * GROUP + rows % GROUP) * out_head) * UNIT
    o = gl.convert_layout((o * inverse[:, None]).to(OUT.dtype.element_ty), flat)
    gl.store(OUT + out_at[:, None] + column[None, :], o, mask=(token < query_len)[:, None])
    if HAS_LSE:
        m_rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        base2 = gl.where(total > 0.0, top + gl.log2(gl.where(total > 0.0, total, 1.0)), float("-inf"))
        lse_at = (q_start + m_rows // GROUP) * HEADS + h * GROUP + m_rows % GROUP
        gl.store(LSE + lse_at, base2 * 0.6931471805599453, mask=m_rows // GROUP < query_len)


@gluon.jit
def consume(
    Q, OUT, LSE, STARTS, b, h, block, q_start, query_len, prefix, length, q_tiles, k_tiles, v_tiles, k_full, v_full,
    k_free, v_free, cleared, tiles, q_token, q_head, out_token, out_head, scale, v_scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    HAS_LSE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """One group of a program for one block of rows: its 64 rows of the queries, all tiles, the output."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    first = (block * 2 + WHICH) * ROWS
    q = q_tiles.index(WHICH)
    ask_queries(Q, q, h, first, q_start, query_len, q_token, q_head, GROUP, UNIT, flat)
    have_queries(UNIT)
    s = warpgroup_mma_wait(0, deps=(first_scores(q, k_tiles, k_full, 0, True, BN, STAGES, mma),))
    gl.thread_barrier()
    mbarrier.arrive(k_free.index(0), count=1)
    acc, top, total = walk(
        s, q, k_tiles, v_tiles, k_full, v_full, k_free, v_free, cleared, first, prefix, length, 0, 0, tiles, scale,
        WHICH, GROUP, BN, STAGES, mma,
    )  # fmt: skip
    o = warpgroup_mma_wait(0, deps=(acc,))
    write_rows(
        OUT, LSE, STARTS, o, top, total, b, h, first, query_len, out_token, out_head, v_scale, GROUP, HEADS, HAS_LSE,
        UNIT, mma, flat,
    )  # fmt: skip
