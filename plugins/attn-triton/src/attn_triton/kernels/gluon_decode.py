"""Decode over an fp8 cache for Hopper in Gluon: tiles stay in registers (kernels/gluon_fp8.py).

The W warps of a program walk N keys each of a tile of W x N, with a softmax of their own, and never wait for each
other; what they found is joined at the end of a piece. The next tile is on its way while one is computed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from attn_triton.kernels.gluon_fp8 import (
    as_summed,
    chunk_pages,
    load_keys,
    load_values,
    part_layout,
    query_layout,
    widened_keys,
    widened_values,
)


@gluon.jit
def block_range(length, window, BN: gl.constexpr, WINDOW: gl.constexpr):
    """First block, end block and lowest key of what a request's last token sees."""
    lowest = length * 0
    if WINDOW:
        lowest = gl.maximum(length - window, 0)
    return lowest // BN, (length + BN - 1) // BN, lowest


@gluon.jit
def soft_capped(s, cap):
    """cap * tanh(s); see kernels/tiles.py."""
    e = gl.exp2(gl.abs(s) * -2.8853900817779268)
    t = (1.0 - e) / (1.0 + e)
    return gl.where(s < 0.0, -t, t) * cap


@gluon.jit
def attend(
    q, row_scale, K, V, page_row, first, last, length, lowest, cap, W: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, PAGE: gl.constexpr, K_PAGE: gl.constexpr, K_TOKEN: gl.constexpr, V_PAGE: gl.constexpr,
    V_TOKEN: gl.constexpr, HAS_CAP: gl.constexpr, E4: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Online softmax of every warp over its keys of tiles ``first``..``last``: accumulators [W, 16, DV] (columns as the
    product gives them), top and total [W, 16]. What is asked for behind tile ``last`` is its last key again.
    """
    row_layout: gl.constexpr = gl.SliceLayout(2, mma)
    column_layout: gl.constexpr = gl.SliceLayout(1, mma)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    top = gl.full([W, 16], float("-inf"), gl.float32, row_layout)
    total = gl.full([W, 16], 0.0, gl.float32, row_layout)
    acc = gl.zeros([W, 16, DV], gl.float32, mma)
    w = gl.arange(0, W, gl.SliceLayout(1, column_layout))
    own = w[:, None] * N + gl.arange(0, N, gl.SliceLayout(0, column_layout))[None, :]
    length = gl.minimum(length, last * (W * N))
    some = first < last
    page, begin = chunk_pages(page_row, first, lowest, length, PAGE, N, W)
    k = load_keys(K, page_row, page, begin, first, some, lowest, length, W, N, D, PAGE, K_PAGE, K_TOKEN)
    v0 = load_values(V, page_row, page, begin, first, some, lowest, length, 0, W, N, DV, PAGE, V_PAGE, V_TOKEN)
    v1 = load_values(V, page_row, page, begin, first, some, lowest, length, 1, W, N, DV, PAGE, V_PAGE, V_TOKEN)
    page, begin = chunk_pages(page_row, first + 1, lowest, length, PAGE, N, W)
    for i in range(first, last):
        wide = as_summed(widened_keys(k, E4, N, D, W), N, D, W).permute((0, 2, 1))
        s = gl.zeros([W, 16, N], gl.float32, mma)
        s = mma_v2(q, gl.convert_layout(wide, right, assert_trivial=True), s)
        k = load_keys(K, page_row, page, begin, i + 1, True, lowest, length, W, N, D, PAGE, K_PAGE, K_TOKEN)
        s = s * gl.expand_dims(row_scale, 2)
        if HAS_CAP:
            s = soft_capped(s, cap)
        n = i * (W * N) + own
        s = gl.where(gl.expand_dims((n < length) & (n >= lowest), 1), s, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, 2))
        finite = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s - gl.expand_dims(finite, 2))
        factor = gl.exp2(top - finite)
        total = total * factor + gl.sum(p, 2)
        top = new_top
        left = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
        wide_v = gl.convert_layout(widened_values(v0, v1, E4, N, DV, W), right, assert_trivial=True)
        acc = mma_v2(left, wide_v, acc * gl.expand_dims(factor, 2))
        v0 = load_values(V, page_row, page, begin, i + 1, True, lowest, length, 0, W, N, DV, PAGE, V_PAGE, V_TOKEN)
        v1 = load_values(V, page_row, page, begin, i + 1, True, lowest, length, 1, W, N, DV, PAGE, V_PAGE, V_TOKEN)
        page, begin = chunk_pages(page_row, i + 2, lowest, length, PAGE, N, W)
    return acc, top, total


@gluon.jit
def load_queries(Q, h, q_at, q_head, D: gl.constexpr, W: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr,
                 mma: gl.constexpr):  # fmt: skip
    """[W, 16, D] queries of a KV head as float16, in the order in which scores sum, and what undoes their scale."""
    layout: gl.constexpr = query_layout(D, W)
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    at = q_at + (h * GROUP + row) * q_head
    pointers = Q + gl.full([W, 1, 1], 0, gl.int32, layout) + at[None, :, None] + column[None, None, :]
    q = gl.load(pointers, mask=(row < GROUP)[None, :, None], other=0.0)
    row_layout: gl.constexpr = gl.SliceLayout(2, mma)
    down = gl.full([W, 16], 1.0, gl.float32, row_layout)
    if HALF:  # a power of two for each row takes bfloat16 into the range of float16; see tiles.halved
        x = q.to(gl.float32)
        peak = gl.max(gl.abs(x), 2)
        exponent = gl.maximum((peak.to(gl.int32, bitcast=True) >> 23) & 255, 14)
        up = ((267 - exponent) << 23).to(gl.float32, bitcast=True)
        down = gl.convert_layout(((exponent - 13) << 23).to(gl.float32, bitcast=True), row_layout)
        q = (x * gl.expand_dims(up, 2)).to(gl.float16)
    q = as_summed(q, 16, D, W)
    return gl.convert_layout(q, gl.DotOperandLayout(0, mma, 2), assert_trivial=True), down


@gluon.jit
def dependence(code: gl.constexpr):
    """What orders this kernel and its neighbours in a stream, as `tl.extra.cuda.gdc_wait` says it."""
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit(
    do_not_specialize=[
        "splits", "q_token", "q_head", "out_token", "out_head", "page_stride", "window", "scale", "cap", "v_scale"
    ]
)  # fmt: skip
def gluon_decode_kernel(
    Q, K, V, PAGES, LENGTHS, SINK_LOGITS, OUT, LSE, PART_OUT, PART_LSE, LINE, BOUNDS, FIRST, splits, q_token, q_head,
    out_token, out_head, page_stride, window, scale, cap, v_scale,
    HKV: gl.constexpr, GROUP: gl.constexpr, W: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, PAGE: gl.constexpr, K_PAGE: gl.constexpr, K_TOKEN: gl.constexpr, K_HEAD: gl.constexpr,
    V_PAGE: gl.constexpr, V_TOKEN: gl.constexpr, V_HEAD: gl.constexpr, FIXED: gl.constexpr, WINDOW: gl.constexpr,
    HAS_CAP: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, HALF: gl.constexpr, E4: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid (groups * HKV): one query a request, its GROUP <= 16 heads of a KV head. The line of blocks is that of
    kernels/decode.py.
    """
    if PDL:
        dependence("griddepcontrol.wait; // $0")
    BN: gl.constexpr = W * N
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    joined: gl.constexpr = gl.BlockedLayout([W, 1, 4], [1, 128 // DV, DV // 4], [1, W, 1], [2, 1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, joined))
    parts = gl.allocate_shared_memory(gl.float32, [W, 16, DV], part_layout(DV, W))
    tops = gl.allocate_shared_memory(gl.float32, [W, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    totals = gl.allocate_shared_memory(gl.float32, [W, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    h = gl.program_id(0) % HKV
    g = gl.program_id(0) // HKV
    if FIXED:
        b = g // splits
        part = g % splits
        length = gl.load(LENGTHS + b)
        first_block, end_block, lowest = block_range(length, window, BN, WINDOW)
        line1 = gl.maximum(end_block - first_block, 1)
        per = (line1 + splits - 1) // splits
        pos = part * per
        end = gl.minimum(pos + per, line1)
    else:
        b = gl.load(FIRST + g)
        pos = gl.load(BOUNDS + g)
        end = gl.load(BOUNDS + g + 1)
    start = pos
    while pos < end:
        length = gl.load(LENGTHS + b)
        first_block, end_block, lowest = block_range(length, window, BN, WINDOW)
        if FIXED:
            line0 = b * 0
            line1 = gl.maximum(end_block - first_block, 1)
        else:
            line0 = gl.load(LINE + b)
            line1 = gl.load(LINE + b + 1)
        stop = gl.minimum(end, line1)
        q, row_scale = load_queries(Q, h, b.to(gl.int64) * q_token, q_head, D, W, GROUP, HALF, mma)
        acc, top, total = attend(
            q, row_scale * scale, K + h * K_HEAD, V + h * V_HEAD, PAGES + b.to(gl.int64) * page_stride,
            first_block + pos - line0, gl.minimum(first_block + stop - line0, end_block), length, lowest, cap,
            W, N, D, DV, PAGE, K_PAGE, K_TOKEN, V_PAGE, V_TOKEN, HAS_CAP, E4, mma,
        )  # fmt: skip
        # All warps' numbers of a row and a column into one thread, the columns in order.
        parts.store(acc.reshape([W, 16, DV // 8, 8]).permute((0, 1, 3, 2)).reshape([W, 16, DV]))
        tops.store(top)
        totals.store(total)
        acc = parts.load(joined)
        top = tops.load(gl.SliceLayout(2, joined))
        total = totals.load(gl.SliceLayout(2, joined))
        rows = gl.arange(0, 16, row_layout)
        peak = gl.max(top, 0)
        if HAS_SINKS:  # the piece that begins a request holds its sink
            logits = gl.load(SINK_LOGITS + h * GROUP + rows, mask=rows < GROUP, other=0.0).to(gl.float32)
            sink = gl.where(pos == line0, logits * 1.4426950408889634, float("-inf"))
            peak = gl.maximum(peak, sink)
        finite = gl.where(peak == float("-inf"), 0.0, peak)
        factor = gl.exp2(top - gl.expand_dims(finite, 0))
        whole = gl.sum(total * factor, 0)
        if HAS_SINKS:
            whole = whole + gl.exp2(sink - finite)
        share = factor * gl.expand_dims(v_scale / gl.where(whole > 0.0, whole, 1.0), 0)
        o = gl.sum(acc * gl.expand_dims(share, 2), 0)
        base2 = gl.where(whole > 0.0, peak + gl.log2(gl.where(whole > 0.0, whole, 1.0)), float("-inf"))
        row = gl.arange(0, 16, gl.SliceLayout(1, gl.SliceLayout(0, joined)))
        column = gl.arange(0, DV, gl.SliceLayout(0, gl.SliceLayout(0, joined)))
        if (pos == line0) & (stop == line1):
            at = b.to(gl.int64) * out_token + (h * GROUP + row) * out_head
            gl.store(OUT + at[:, None] + column[None, :], o.to(OUT.dtype.element_ty), mask=(row < GROUP)[:, None])
            if HAS_LSE:
                gl.store(LSE + b * (HKV * GROUP) + h * GROUP + rows, base2 * 0.6931471805599453, mask=rows < GROUP)
        else:
            slot = g
            if not FIXED:
                slot = 2 * g + (pos != start).to(gl.int32)
            part_row = (slot * HKV + h) * 16
            at = (part_row + row).to(gl.int64) * DV
            gl.store(PART_OUT + at[:, None] + column[None, :], o, mask=(row < GROUP)[:, None])
            gl.store(PART_LSE + part_row + rows, base2, mask=rows < GROUP)
        pos = stop
        if not FIXED:
            b += 1
    if PDL:
        dependence("griddepcontrol.launch_dependents; // $0")
