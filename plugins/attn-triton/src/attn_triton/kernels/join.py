"""Who computes which blocks (``schedule_kernel``, once a step), and what becomes one of the parts
(``merge_kernel``).
"""

import triton
import triton.language as tl

from attn_triton.kernels.decode import num_blocks
from attn_triton.kernels.tiles import finish, log_sum


@triton.jit
def first_group(x, total, groups):
    """The group that owns block ``x`` of ``total`` when group g begins at floor(g * total / groups)."""
    return (((x.to(tl.int64) + 1) * groups - 1) // total).to(tl.int32)


@triton.jit(do_not_specialize=["batch", "groups", "stream_groups", "splits", "window"])
def schedule_kernel(
    LENGTHS,
    STARTS,
    LINE,
    BOUNDS,
    FIRST,
    OWNERS,
    batch,
    groups,
    stream_groups,
    splits,
    window,
    BATCH: tl.constexpr,
    BN: tl.constexpr,
    SINGLE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Cuts the line of all blocks into at most ``groups`` pieces. Grid: max(groups + 1, batch).

    Lengths that are about even get ``splits`` pieces each (0: never), which begin and end with a request; others get
    ``stream_groups`` equal pieces of the whole line. LINE [batch + 1]: where each request begins; BOUNDS [groups + 1]:
    where each piece does; FIRST [groups]: the request it begins in; OWNERS [batch, 2]: the first and the last piece of
    each request.
    """
    pid = tl.program_id(0)
    ids = tl.arange(0, BATCH)
    real = ids < batch
    lengths = tl.load(LENGTHS + ids, mask=real, other=0)
    safe = tl.where(real, ids, 0)
    blocks = tl.where(real, num_blocks(lengths, STARTS, safe, window, BN, SINGLE, WINDOW), 0)
    ends = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    even = (splits > 0) & (tl.max(blocks, 0).to(tl.int64) * batch * 4 <= total.to(tl.int64) * 5)

    active = tl.minimum(stream_groups, total)
    begin = tl.where(pid < active, (pid.to(tl.int64) * total // active).to(tl.int32), total)
    pieces = tl.maximum(splits, 1)
    b = pid // pieces
    own = tl.sum(tl.where(ids == b, blocks, 0), 0)
    per = tl.maximum((own + pieces - 1) // pieces, 1)
    before = tl.sum(tl.where(ids < b, blocks, 0), 0)
    begin_even = tl.where(b < batch, before + tl.minimum(pid % pieces * per, own), total)
    begin = tl.where(even, begin_even, begin)
    if pid <= groups:
        tl.store(BOUNDS + pid, begin)
    if pid < groups:
        tl.store(FIRST + pid, tl.sum((ends <= begin).to(tl.int32), 0))

    if pid < batch:
        mine = tl.sum(tl.where(ids == pid, blocks, 0), 0)
        line1 = tl.sum(tl.where(ids == pid, ends, 0), 0)
        line0 = line1 - mine
        share = (mine + pieces - 1) // pieces
        first_even = pid * pieces
        last_even = first_even + (mine + share - 1) // share - 1
        tl.store(LINE + pid + 1, line1)
        tl.store(OWNERS + 2 * pid, tl.where(even, first_even, first_group(line0, total, active)))
        tl.store(OWNERS + 2 * pid + 1, tl.where(even, last_even, first_group(line1 - 1, total, active)))
    if pid == 0:
        tl.store(LINE, 0)


@triton.jit(do_not_specialize=["splits", "out_token", "out_head", "window"])
def merge_kernel(
    LENGTHS,
    STARTS,
    OUT,
    LSE,
    PART_OUT,
    PART_LSE,
    LINE,
    BOUNDS,
    OWNERS,
    splits,
    out_token,
    out_head,
    window,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    RT: tl.constexpr,
    PARTS: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    FIXED: tl.constexpr,
    SINGLE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Joins the parts of rows RT at a time: out = sum 2^(l_i - m) o_i / sum 2^(l_i - m). Grid (batch * HKV * TILES,
    ROWS / RT).

    Parts are normalised, with base-2 LSE; they are read PARTS at a time, always in the order of the keys.
    """
    pid = tl.program_id(0)
    h = pid % HKV
    tile = pid // HKV % TILES
    b = pid // (HKV * TILES)
    r = tl.program_id(1) * RT + tl.arange(0, RT)
    c = tl.arange(0, PADDED)
    if FIXED:
        own = num_blocks(tl.load(LENGTHS + b), STARTS, b, window, BN, SINGLE, WINDOW)
        per = (own + splits - 1) // splits
        first = b * splits
        last = first + (own + per - 1) // per - 1
        early = 0
    else:
        first = tl.load(OWNERS + 2 * b)
        last = tl.load(OWNERS + 2 * b + 1)
        early = (tl.load(BOUNDS + first) < tl.load(LINE + b)).to(tl.int32)
    q_start = b
    query_len = 1
    if not SINGLE:
        q_start = tl.load(STARTS + b)
        query_len = tl.load(STARTS + b + 1) - q_start
    row = tile * BM + r
    token = row // GROUP
    head = h * GROUP + row % GROUP
    live = (r < ROWS) & (token < query_len)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if last > first:
        top = tl.full([RT], float("-inf"), tl.float32)
        weight = tl.zeros([RT], tl.float32)
        acc = tl.zeros([RT, PADDED], tl.float32)
        for p in range(first, last + 1, PARTS):
            parts = p + tl.arange(0, PARTS)
            there = (parts <= last)[:, None] & live[None, :]
            slot = parts
            if not FIXED:
                slot = 2 * parts + tl.where(parts == first, early, 0)
            at = ((slot * TILES + tile) * HKV + h)[:, None] * BM + r[None, :]
            lse = tl.load(PART_LSE + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            new_top = tl.maximum(top, tl.max(lse, 0))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            factor = tl.exp2(top - finite)
            e = tl.exp2(lse - finite[None, :])
            out_at = at.to(tl.int64)[:, :, None] * WIDTH + c[None, None, :]
            keep = there[:, :, None] & (c < WIDTH)[None, None, :]
            o = tl.load(PART_OUT + out_at, mask=keep, other=0.0, cache_modifier=".cg")
            acc = acc * factor[:, None] + tl.sum(o * e[:, :, None], 0)
            weight = weight * factor + tl.sum(e, 0)
            top = new_top
        out = finish(acc, weight)
        out_at = (q_start + token).to(tl.int64) * out_token + head * out_head
        keep = live[:, None] & (c < DV)[None, :]
        tl.store(OUT + out_at[:, None] + c[None, :], out.to(OUT.dtype.element_ty), mask=keep)
        if HAS_LSE:
            base2 = log_sum(top, weight)
            tl.store(LSE + (q_start + token) * (HKV * GROUP) + head, base2 * 0.6931471805599453, mask=live)
