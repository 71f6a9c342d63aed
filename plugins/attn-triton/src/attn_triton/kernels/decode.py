"""Attention of few query rows over a long paged cache: the keys of a request are split over programs, and joined after.

All blocks of BN keys of all requests form one line. A group is a piece of that line; its programs, one for each KV head
and row tile, walk the same piece together, so that a page is read by neighbours at the same time. FIXED cuts every
request into the same number of pieces without asking anyone; otherwise the pieces come from ``schedule_kernel``.
A piece that holds all of a request writes the output; others write partial results, which ``merge_kernel`` joins
(Flash-Decoding; the line of blocks is stream-K's). Nothing is added atomically: the same batch gives the same bits.
"""

import triton
import triton.language as tl

from attn_triton.kernels.tiles import (
    dot,
    finish,
    halved,
    load_rows,
    log_sum,
    scores,
    soft_capped,
    softmax_step,
    visible_keys,
    widened,
    with_sink,
)


@triton.jit
def block_range(length, query_len, window, BN: tl.constexpr, WINDOW: tl.constexpr):
    """First block, end block and lowest key of what a request's ``query_len`` last tokens see."""
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(length - query_len - window + 1, 0)
    return lowest // BN, (length + BN - 1) // BN, lowest


@triton.jit
def num_blocks(length, STARTS, b, window, BN: tl.constexpr, SINGLE: tl.constexpr, WINDOW: tl.constexpr):
    """How long request ``b`` is on the line: its blocks, at least one, so that somebody writes the output of a request
    without keys.
    """
    query_len = 1
    if not SINGLE:
        query_len = tl.load(STARTS + b + 1) - tl.load(STARTS + b)
    first_block, end_block, _ = block_range(length, query_len, window, BN, WINDOW)
    return tl.maximum(end_block - first_block, 1)


@triton.jit
def page_of(page_row, i, lowest, length, end_block, PAGE: tl.constexpr, BN: tl.constexpr):
    """The page ids of block ``i`` of BN keys: one if a page holds whole blocks, else one a key. Past the end the last
    page repeats.
    """
    if PAGE % BN == 0:
        page = tl.load(page_row + (tl.maximum(tl.minimum(i, end_block - 1), 0) * BN) // PAGE)
    else:
        n = tl.maximum(tl.minimum(i * BN + tl.arange(0, BN), length - 1), lowest)
        page = tl.load(page_row + n // PAGE)
    return page


@triton.jit
def attend_blocks(
    q0,
    q1,
    K,
    V,
    page_row,
    first_block,
    end_block,
    length,
    lowest,
    first_seen,
    last_seen,
    prefix,
    row_live,
    token,
    tree_row,
    depth_row,
    row_scale,
    scale,
    cap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V_IN_K: tl.constexpr,
    PAGE: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_TOKEN: tl.constexpr,
    SINGLE: tl.constexpr,
    TREE: tl.constexpr,
    Q_TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HALF: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Online softmax over blocks ``first_block``..``end_block``: accumulators [BM, V0] and [BM, V1], top and total
    [BM].

    Keys that nobody sees are clamped to one that is seen: what is loaded is data, so that 0 * NaN cannot happen.
    """
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, V0], tl.float32)
    acc1 = tl.zeros([BM, V1 if V1 > 0 else 16], tl.float32)
    offset = tl.arange(0, BN)
    # The page ids travel one block ahead: a load of them inside the body would take a stage of the pipeline away.
    page = page_of(page_row, first_block, lowest, length, end_block, PAGE, BN)
    for i in tl.range(first_block, end_block, num_stages=STAGES):
        n = i * BN + offset
        at = tl.maximum(tl.minimum(n, length - 1), lowest) % PAGE
        k_rows = page.to(tl.int64) * K_PAGE + at * K_TOKEN
        k0 = load_rows(K, k_rows, row_live, 0, D0, D, False)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(K, k_rows, row_live, D0, D1, D, False)
        v0 = k0
        v1 = k1
        if not V_IN_K:
            v_rows = page.to(tl.int64) * V_PAGE + at * V_TOKEN
            v0 = load_rows(V, v_rows, row_live, 0, V0, DV, False)
            if V1 > 0:
                v1 = load_rows(V, v_rows, row_live, V0, V1, DV, False)
        page = page_of(page_row, i + 1, lowest, length, end_block, PAGE, BN)
        if WIDEN:
            k0 = widened(k0)
            if D1 > 0:
                k1 = widened(k1)
        s = scores(q0, q1, k0, k1, BM, BN, D1)
        if HALF:
            s = s * row_scale[:, None]
        if HAS_CAP:
            s = soft_capped(s, scale, cap)
        if SINGLE:
            seen = (n < length) & (n >= lowest)
            s = tl.where(seen[None, :], s, float("-inf"))
        else:
            seen = visible_keys(
                n, first_seen, last_seen, prefix, row_live, token, tree_row, depth_row, TREE, WINDOW, Q_TREE
            )
            s = tl.where(seen, s, float("-inf"))
        p, factor, top, total = softmax_step(s, top, total, scale, HAS_CAP, not SINGLE)
        p = p.to(q0.dtype)
        if V_IN_K:
            v0 = k0
            v1 = k1
        elif WIDEN:
            v0 = widened(v0)
            if V1 > 0:
                v1 = widened(v1)
        acc0 = dot(p, v0, acc0 * factor[:, None])
        if V1 > 0:
            acc1 = dot(p, v1, acc1 * factor[:, None])
    return acc0, acc1, top, total


@triton.jit(
    do_not_specialize=[
        "splits", "q_token", "q_head", "out_token", "out_head", "page_stride", "window", "scale", "cap", "v_scale"
    ]
)  # fmt: skip
def decode_kernel(
    Q,
    K,
    V,
    PAGES,
    LENGTHS,
    STARTS,
    TREE_MASK,
    DEPTHS,
    SINK_LOGITS,
    OUT,
    LSE,
    PART_OUT,
    PART_LSE,
    LINE,
    BOUNDS,
    FIRST,
    splits,
    q_token,
    q_head,
    out_token,
    out_head,
    page_stride,
    window,
    scale,
    cap,
    v_scale,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V_IN_K: tl.constexpr,
    PAGE: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_TOKEN: tl.constexpr,
    V_HEAD: tl.constexpr,
    FIXED: tl.constexpr,
    SINGLE: tl.constexpr,
    CROSS: tl.constexpr,
    TREE: tl.constexpr,
    Q_TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HALF: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (groups * TILES * HKV). Rows are (token, query head of the group), BM of them a tile."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    h = pid % HKV
    tile = pid // HKV % TILES
    g = pid // (HKV * TILES)
    if FIXED:
        b = g // splits
        part = g % splits
        length = tl.load(LENGTHS + b)
        line1 = num_blocks(length, STARTS, b, window, BN, SINGLE, WINDOW)
        per = (line1 + splits - 1) // splits
        pos = part * per
        end = tl.minimum(pos + per, line1)
    else:
        b = tl.load(FIRST + g)
        pos = tl.load(BOUNDS + g)
        end = tl.load(BOUNDS + g + 1)
    start = pos
    while pos < end:
        if FIXED:
            line0 = 0
        else:
            line0 = tl.load(LINE + b)
            line1 = tl.load(LINE + b + 1)
            length = tl.load(LENGTHS + b)
        stop = tl.minimum(end, line1)
        q_start = b
        query_len = 1
        if not SINGLE:
            q_start = tl.load(STARTS + b)
            query_len = tl.load(STARTS + b + 1) - q_start
        first_block, end_block, lowest = block_range(length, query_len, window, BN, WINDOW)
        rows = tile * BM + tl.arange(0, BM)
        token = rows // GROUP
        head = h * GROUP + rows % GROUP
        live = token < query_len
        q_at = (q_start + token).to(tl.int64) * q_token + head * q_head
        q0 = load_rows(Q, q_at, live, 0, D0, D, True)
        q1 = q0
        if D1 > 0:
            q1 = load_rows(Q, q_at, live, D0, D1, D, True)
        row_scale = live
        if HALF:
            q0, q1, row_scale = halved(q0, q1, D1)
        prefix = length - query_len
        tree_row = TREE_MASK
        depth_row = DEPTHS
        position = prefix + token
        if TREE:
            tree_row = TREE_MASK + b.to(tl.int64) * (Q_TREE * Q_TREE)
            depth_row = DEPTHS + b * Q_TREE
            position = prefix + tl.load(depth_row + token, mask=live, other=0)
        last_seen = position
        if CROSS:
            last_seen = tl.zeros([BM], tl.int32) + (length - 1)
        first_seen = tl.zeros([BM], tl.int32)
        if WINDOW:
            first_seen = position - window + 1
        acc0, acc1, top, total = attend_blocks(
            q0, q1, K + h * K_HEAD, V + h * V_HEAD, PAGES + b.to(tl.int64) * page_stride,
            first_block + pos - line0, tl.minimum(first_block + stop - line0, end_block), length, lowest,
            first_seen, last_seen, prefix, live, token, tree_row, depth_row, row_scale, scale, cap,
            BM, BN, STAGES, D, D0, D1, DV, V0, V1, V_IN_K, PAGE, K_PAGE, K_TOKEN, V_PAGE, V_TOKEN,
            SINGLE, TREE, Q_TREE, WINDOW, HAS_CAP, HALF, WIDEN,
        )  # fmt: skip
        if HAS_SINKS:  # the piece that begins a request holds its sink
            logits = tl.load(SINK_LOGITS + head, mask=live, other=0.0).to(tl.float32)
            sink = tl.where(pos == line0, logits * 1.4426950408889634, float("-inf"))
            factor, top, total = with_sink(top, total, sink)
            acc0 = acc0 * factor[:, None]
            acc1 = acc1 * factor[:, None]
        out0 = finish(acc0, total) * v_scale
        base2 = log_sum(top, total)
        c0 = tl.arange(0, V0)
        if (pos == line0) & (stop == line1):
            out_at = (q_start + token).to(tl.int64) * out_token + head * out_head
            keep = live[:, None] & (c0 < DV)[None, :]
            tl.store(OUT + out_at[:, None] + c0[None, :], out0.to(OUT.dtype.element_ty), mask=keep)
            if V1 > 0:
                c1 = V0 + tl.arange(0, V1)
                out1 = finish(acc1, total) * v_scale
                keep1 = live[:, None] & (c1 < DV)[None, :]
                tl.store(OUT + out_at[:, None] + c1[None, :], out1.to(OUT.dtype.element_ty), mask=keep1)
            if HAS_LSE:
                tl.store(LSE + (q_start + token) * (HKV * GROUP) + head, base2 * 0.6931471805599453, mask=live)
        else:
            slot = g
            if not FIXED:
                slot = 2 * g + (pos != start).to(tl.int32)
            part_row = ((slot * TILES + tile) * HKV + h) * BM + tl.arange(0, BM)
            part_at = PART_OUT + part_row.to(tl.int64)[:, None] * (V0 + V1)
            tl.store(part_at + c0[None, :], out0, mask=live[:, None])
            if V1 > 0:
                out1 = finish(acc1, total) * v_scale
                tl.store(part_at + V0 + tl.arange(0, V1)[None, :], out1, mask=live[:, None])
            tl.store(PART_LSE + part_row, base2, mask=live)
        pos = stop
        if not FIXED:
            b += 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
