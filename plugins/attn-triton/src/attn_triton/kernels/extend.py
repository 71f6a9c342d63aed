"""Attention of many query rows: prompts with or without a cached prefix, mixed batches, verify, cross, and keys that
are not cached.

A program takes BM rows, (token, query head of a KV head's group) side by side, so that any group size fills a tile, and
walks the keys these rows see: tiles cut by a window's start, tiles seen in full, tiles cut by the diagonal, by spans,
by a tree or by the end.
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
    with_sink,
)


@triton.jit
def tile_pages(page_row, n0, last_page, PAGE: tl.constexpr, BN: tl.constexpr):
    """Page ids of the tile of BN keys from ``n0``, a multiple of BN: one, or one a key; the index is held at
    ``last_page``.
    """
    if PAGE % BN == 0:
        page = tl.load(page_row + tl.minimum(n0 // PAGE, last_page))
    elif BN % PAGE == 0:
        page = tl.load(page_row + tl.minimum(n0 // PAGE + tl.arange(0, BN) // PAGE, last_page))
    else:
        page = tl.load(page_row + tl.minimum((n0 + tl.arange(0, BN)) // PAGE, last_page))
    return page


@triton.jit
def tile_rows(page, n0, STRIDE_PAGE: tl.constexpr, STRIDE_TOKEN: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr):
    """[BN] int64 element offsets of a tile's keys. In whole pages the place inside a page is the same in every tile."""
    if PAGE % BN == 0:
        rows = page.to(tl.int64) * STRIDE_PAGE + (n0 % PAGE + tl.arange(0, BN)) * STRIDE_TOKEN
    elif BN % PAGE == 0:
        rows = page.to(tl.int64) * STRIDE_PAGE + tl.arange(0, BN) % PAGE * STRIDE_TOKEN
    else:
        rows = page.to(tl.int64) * STRIDE_PAGE + (n0 + tl.arange(0, BN)) % PAGE * STRIDE_TOKEN
    return rows


@triton.jit
def run_tiles(
    acc0,
    acc1,
    top,
    total,
    q0,
    q1,
    K,
    V,
    page_row,
    begin,
    end,
    lowest,
    highest,
    first_seen,
    last_seen,
    prefix,
    live,
    token,
    tree_row,
    depth_row,
    row_scale,
    scale,
    cap,
    MASKED: tl.constexpr,
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
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_TOKEN: tl.constexpr,
    TREE: tl.constexpr,
    Q_TREE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HALF: tl.constexpr,
):
    """Tiles ``begin``..``end`` (begin a multiple of BN). MASKED: what a row sees is asked for every key, and keys
    outside ``lowest``..``highest`` are read as the nearest one inside, so that what is loaded is data and 0 * NaN
    cannot happen.
    """
    page = 0
    if (
        PAGED and not MASKED
    ):  # page ids travel one tile ahead: an indirect load in the body takes a stage of the pipeline away
        page = tile_pages(page_row, begin, highest // PAGE, PAGE, BN)
    for n0 in tl.range(begin, end, BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)
        if MASKED:
            held = tl.maximum(tl.minimum(n, highest), lowest)
            if PAGED:
                own_page = tl.load(page_row + held // PAGE).to(tl.int64)
                k_rows = own_page * K_PAGE + held % PAGE * K_TOKEN
                v_rows = own_page * V_PAGE + held % PAGE * V_TOKEN
            else:
                k_rows = held.to(tl.int64) * K_TOKEN
                v_rows = held.to(tl.int64) * V_TOKEN
        elif PAGED:
            k_rows = tile_rows(page, n0, K_PAGE, K_TOKEN, PAGE, BN)
            v_rows = tile_rows(page, n0, V_PAGE, V_TOKEN, PAGE, BN)
        else:
            k_rows = n.to(tl.int64) * K_TOKEN
            v_rows = n.to(tl.int64) * V_TOKEN
        k0 = load_rows(K, k_rows, live, 0, D0, D, False)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(K, k_rows, live, D0, D1, D, False)
        s = scores(q0, q1, k0, k1, BM, BN, D1)
        if HALF:
            s = s * row_scale[:, None]
        if HAS_CAP:
            s = soft_capped(s, scale, cap)
        if MASKED:
            seen = visible_keys(
                n, first_seen, last_seen, prefix, live, token, tree_row, depth_row, TREE, WINDOW, Q_TREE
            )
            s = tl.where(seen, s, float("-inf"))
        p, factor, top, total = softmax_step(s, top, total, scale, HAS_CAP, MASKED)
        v0 = k0
        v1 = k1
        if not V_IN_K:
            v0 = load_rows(V, v_rows, live, 0, V0, DV, False)
            if V1 > 0:
                v1 = load_rows(V, v_rows, live, V0, V1, DV, False)
        p = p.to(q0.dtype)
        acc0 = dot(p, v0, acc0 * factor[:, None])
        if V1 > 0:
            acc1 = dot(p, v1, acc1 * factor[:, None])
        if PAGED and not MASKED:
            page = tile_pages(page_row, n0 + BN, highest // PAGE, PAGE, BN)
    return acc0, acc1, top, total


@triton.jit
def span_end(position, span_row, num_spans, last_seen):
    """The last key each row sees when tokens of one span see each other both ways: the end of the spans it lies in, if
    that is later.
    """
    for i in range(num_spans):
        start = tl.load(span_row + 2 * i)
        stop = tl.load(span_row + 2 * i + 1)
        inside = (position >= start) & (position < stop)
        last_seen = tl.where(inside, tl.maximum(last_seen, stop - 1), last_seen)
    return last_seen


@triton.jit(
    do_not_specialize=[
        "batch", "blocks", "num_spans", "q_token", "q_head", "out_token", "out_head", "page_stride", "window", "scale",
        "cap", "v_scale",
    ]
)  # fmt: skip
def extend_kernel(
    Q,
    K,
    V,
    PAGES,
    LENGTHS,
    STARTS,
    KEY_STARTS,
    SPANS,
    TREE_MASK,
    DEPTHS,
    SINK_LOGITS,
    OUT,
    LSE,
    TILE_MAP,
    batch,
    blocks,
    num_spans,
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
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    K_PAGE: tl.constexpr,
    K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_PAGE: tl.constexpr,
    V_TOKEN: tl.constexpr,
    V_HEAD: tl.constexpr,
    MAPPED: tl.constexpr,
    BY_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    Q_TREE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Grid (row blocks of all requests * HKV), MAPPED through TILE_MAP [blocks, 2] (request, block) or ``blocks`` for
    each of ``batch``.

    BY_HEAD puts the row blocks of one KV head side by side; otherwise the blocks with the most keys begin first.
    """
    pid = tl.program_id(0)
    if MAPPED:
        if BY_HEAD:
            h = pid // blocks
            entry = pid % blocks
        else:
            h = pid % HKV
            entry = pid // HKV
        b = tl.load(TILE_MAP + 2 * entry)
        block = tl.load(TILE_MAP + 2 * entry + 1)
    elif BY_HEAD:
        block = blocks - 1 - pid % blocks
        h = pid // blocks % HKV
        b = pid // (blocks * HKV)
    else:
        block = blocks - 1 - pid // (batch * HKV)
        h = pid % HKV
        b = pid % (batch * HKV) // HKV
    q_start = tl.load(STARTS + b)
    query_len = tl.load(STARTS + b + 1) - q_start
    if PAGED:
        length = tl.load(LENGTHS + b)
    else:
        length = tl.load(KEY_STARTS + b + 1) - tl.load(KEY_STARTS + b)
    if block * BM < query_len * GROUP:
        rows = block * BM + tl.arange(0, BM)
        token = rows // GROUP
        head = h * GROUP + rows % GROUP
        live = token < query_len
        q_at = ((q_start + token).to(tl.int64) * q_token + head * q_head) * UNIT
        q0 = load_rows(Q, q_at, live, 0, D0, D, True)
        q1 = q0
        if D1 > 0:
            q1 = load_rows(Q, q_at, live, D0, D1, D, True)
        row_scale = live
        if HALF:
            q0, q1, row_scale = halved(q0, q1, D1)
        page_row = PAGES + b.to(tl.int64) * page_stride
        K += h * K_HEAD
        V += h * V_HEAD
        if not PAGED:
            key_start = tl.load(KEY_STARTS + b).to(tl.int64)
            K += key_start * K_TOKEN
            V += key_start * V_TOKEN

        prefix = length - query_len
        first_token = block * BM // GROUP
        last_token = tl.minimum((block * BM + BM - 1) // GROUP, query_len - 1)
        position = prefix + tl.minimum(token, last_token)
        tree_row = TREE_MASK
        depth_row = DEPTHS
        last_seen = tl.zeros([BM], tl.int32) + (length - 1)
        lowest = 0
        full0 = 0
        full1 = length
        end = length
        if CAUSAL:
            last_seen = position
            full1 = prefix + first_token + 1
            end = prefix + last_token + 1
        if HAS_SPANS:
            last_seen = span_end(position, SPANS + b.to(tl.int64) * num_spans * 2, num_spans, last_seen)
            last_seen = tl.minimum(last_seen, length - 1)  # of an image whose end is not here yet
            end = tl.max(last_seen, 0) + 1
        if TREE:
            tree_row = TREE_MASK + b.to(tl.int64) * (Q_TREE * Q_TREE)
            depth_row = DEPTHS + b * Q_TREE
            position = prefix + tl.load(depth_row + token, mask=live, other=0)
            last_seen = position
            full1 = prefix
            end = length
        first_seen = tl.zeros([BM], tl.int32)
        if WINDOW:
            first_seen = position - window + 1
            lowest = tl.maximum(tl.min(first_seen, 0), 0)
            full0 = tl.maximum(tl.max(first_seen, 0), 0)
        full1 = tl.maximum(full1, 0) // BN * BN
        begin = lowest // BN * BN
        full0 = tl.minimum((full0 + BN - 1) // BN * BN, tl.maximum((end + BN - 1) // BN * BN, begin))
        full1 = tl.maximum(full1, full0)
        highest = tl.maximum(length - 1, 0)

        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc0 = tl.zeros([BM, V0], tl.float32)
        acc1 = tl.zeros([BM, V1 if V1 > 0 else 16], tl.float32)
        if WINDOW:
            acc0, acc1, top, total = run_tiles(
                acc0, acc1, top, total, q0, q1, K, V, page_row, begin, full0, lowest, highest, first_seen, last_seen,
                prefix, live, token, tree_row, depth_row, row_scale, scale, cap, True, BM, BN, STAGES, D, D0, D1, DV,
                V0, V1, V_IN_K, PAGED, PAGE, K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, TREE, Q_TREE, WINDOW, HAS_CAP, HALF,
            )  # fmt: skip
        acc0, acc1, top, total = run_tiles(
            acc0, acc1, top, total, q0, q1, K, V, page_row, full0, full1, lowest, highest, first_seen, last_seen,
            prefix, live, token, tree_row, depth_row, row_scale, scale, cap, False, BM, BN, STAGES, D, D0, D1, DV, V0,
            V1, V_IN_K, PAGED, PAGE, K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, TREE, Q_TREE, WINDOW, HAS_CAP, HALF,
        )  # fmt: skip
        acc0, acc1, top, total = run_tiles(
            acc0, acc1, top, total, q0, q1, K, V, page_row, full1, end, lowest, highest, first_seen, last_seen,
            prefix, live, token, tree_row, depth_row, row_scale, scale, cap, True, BM, BN, STAGES, D, D0, D1, DV, V0,
            V1, V_IN_K, PAGED, PAGE, K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, TREE, Q_TREE, WINDOW, HAS_CAP, HALF,
        )  # fmt: skip

        if HAS_SINKS:
            logits = tl.load(SINK_LOGITS + head, mask=live, other=0.0).to(tl.float32)
            factor, top, total = with_sink(top, total, logits * 1.4426950408889634)
            acc0 = acc0 * factor[:, None]
            acc1 = acc1 * factor[:, None]

        # Read again, volatile, so that rows and offsets are computed again and hold no registers across the loops.
        again = tl.load(STARTS + b, volatile=True)
        rows = block * BM + (again - q_start) + tl.arange(0, BM)
        q_start = again
        token = rows // GROUP
        head = h * GROUP + rows % GROUP
        live = token < query_len
        out_at = ((q_start + token).to(tl.int64) * out_token + head * out_head) * UNIT
        c0 = tl.arange(0, V0)
        out0 = finish(acc0, total) * v_scale
        tl.store(
            OUT + out_at[:, None] + c0[None, :],
            out0.to(OUT.dtype.element_ty),
            mask=live[:, None] & (c0 < DV)[None, :],
        )
        if V1 > 0:
            c1 = V0 + tl.arange(0, V1)
            out1 = finish(acc1, total) * v_scale
            tl.store(
                OUT + out_at[:, None] + c1[None, :],
                out1.to(OUT.dtype.element_ty),
                mask=live[:, None] & (c1 < DV)[None, :],
            )
        if HAS_LSE:
            base2 = log_sum(top, total)
            tl.store(LSE + (q_start + token) * (HKV * GROUP) + head, base2 * 0.6931471805599453, mask=live)


@triton.jit(do_not_specialize=["batch", "entries"])
def tile_map_kernel(
    STARTS, TILE_MAP, batch, entries, BATCH: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr
):
    """TILE_MAP [entries, 2]: (request, row block) of every row block, the last blocks of a request first. Grid (entries
    / CHUNK).

    Entries that are left over name request 0 with a block past its end: a program without rows.
    """
    ids = tl.arange(0, BATCH)
    real = ids < batch
    query_lens = tl.load(STARTS + ids + 1, mask=real, other=0) - tl.load(STARTS + ids, mask=real, other=0)
    counts = (query_lens * GROUP + BM - 1) // BM
    ends = tl.cumsum(counts, 0)
    entry = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    b = tl.sum((ends[None, :] <= entry[:, None]).to(tl.int32) * real[None, :].to(tl.int32), 1)
    mine = ids[None, :] == b[:, None]
    end = tl.sum(tl.where(mine, ends[None, :], 0), 1)
    past = b >= batch
    block = tl.where(past, 1 << 20, end - 1 - entry)
    tl.store(TILE_MAP + 2 * entry, tl.where(past, 0, b), mask=entry < entries)
    tl.store(TILE_MAP + 2 * entry + 1, block, mask=entry < entries)
