"""Our Triton kernels around FlashInfer: page indices, packed masks, and sinks folded into an output."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from attn_core.runtime.batch import ForwardBatch
from torch import Tensor

from attn_flashinfer.kernels.launching import current_stream, launcher

_TILE = 1024
_HEADS = 8


@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=["page_table", "indptr", "indices"])
def _expand(page_table, indptr, indices, row_stride, TILE: tl.constexpr):
    b = tl.program_id(0)
    first = tl.load(indptr + b)
    count = tl.load(indptr + b + 1) - first
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = column < count
    tl.store(indices + first + column, tl.load(page_table + b.to(tl.int64) * row_stride + column, mask=live), mask=live)


#: What launches the one compiled form of `_expand`, by device: it assumes nothing of its arguments.
_EXPAND: dict[torch.device, Any] = {}


def launch_expand(page_table: Tensor, indptr: Tensor, indices: Tensor, longest: int) -> None:
    """See `page_indices.expand`."""
    page_table = _dense_rows(page_table)
    row_stride, device = page_table.stride(0), page_table.device
    grid = (page_table.shape[0], -(-longest // _TILE), 1)
    launch = _EXPAND.get(device)
    if launch is None:
        compiled = _expand[grid](page_table, indptr, indices, row_stride, TILE=_TILE, num_warps=4)
        if compiled is not None:  # Triton's interpreter compiles nothing
            _EXPAND[device] = launcher(compiled)
        return
    pointers = page_table.data_ptr(), indptr.data_ptr(), indices.data_ptr()
    launch(*grid[:2], current_stream(device), *pointers, row_stride, _TILE)


def _dense_rows(page_table: Tensor) -> Tensor:
    return page_table if page_table.stride(1) == 1 else page_table.contiguous()


@triton.jit(
    do_not_specialize=["row_stride", "batch_size", "page_size"],
    do_not_specialize_on_alignment=["page_table", "lens", "indptr", "last_page_len", "indices"],
)
def _refill(
    page_table, lens, indptr, last_page_len, indices, row_stride, batch_size, page_size,
    BATCH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    request = tl.arange(0, BATCH)
    tokens = tl.load(lens + request, mask=request < batch_size, other=0)
    pages = (tokens + page_size - 1) // page_size
    first = tl.sum(tl.where(request < b, pages, 0), 0)
    count = tl.sum(tl.where(request == b, pages, 0), 0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = column < count
    tl.store(indices + first + column, tl.load(page_table + b.to(tl.int64) * row_stride + column, mask=live), mask=live)
    if tl.program_id(1) == 0:
        tl.store(indptr + b + 1, first + count)
        tl.store(last_page_len + b, tl.load(lens + b) - tl.maximum(count - 1, 0) * page_size)
        if b == 0:
            tl.store(indptr, 0)


class Refill:
    """Page table and lengths of a step to indptr, last_page_len and indices, all of graphs': one tiled kernel."""

    _LAUNCH: ClassVar[dict[tuple[torch.device, int], Any]] = {}

    def __init__(self, indptr: Tensor, last_page_len: Tensor, indices: Tensor, page_size: int) -> None:
        self._outputs = (indptr, last_page_len, indices)
        self._pointers = tuple(output.data_ptr() for output in self._outputs)
        self._page_size = page_size
        self._device = indices.device
        self._constants = triton.next_power_of_2(len(last_page_len)), 4 * _TILE

    def __call__(self, lens: Tensor, page_table: Tensor, longest: int) -> None:
        """``lens`` [B] and ``page_table`` [B, pages] on the device; ``longest``: the most pages of a request."""
        page_table, lens = _dense_rows(page_table), lens.contiguous()
        batch_size, row_stride = page_table.shape[0], page_table.stride(0)
        x, y = batch_size, max(1, -(-longest // self._constants[1]))
        launch = self._LAUNCH.get((self._device, self._constants[0]))
        if launch is None:
            compiled = _refill[x, y](
                page_table, lens, *self._outputs, row_stride, batch_size, self._page_size,
                BATCH=self._constants[0], TILE=self._constants[1], num_warps=8,
            )  # fmt: skip
            if compiled is not None:
                self._LAUNCH[self._device, self._constants[0]] = launcher(compiled)
            return
        pointers = page_table.data_ptr(), lens.data_ptr(), *self._pointers
        launch(x, y, current_stream(self._device), *pointers, row_stride, batch_size, self._page_size, *self._constants)


@triton.jit
def _depths(visible, depths, drafts, Q: tl.constexpr):
    column = tl.arange(0, Q)
    seen = tl.load(visible + tl.program_id(0) * drafts + column, mask=column < drafts, other=0).to(tl.int32)
    tl.store(depths + tl.program_id(0), tl.sum(seen, 0) - 1)


@triton.jit
def _pack(
    packed, byte_starts, seq_lens, query_start_loc, visible, depths, spans, window, num_spans, drafts,
    TREE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    first = tl.load(byte_starts + b)
    count = tl.load(byte_starts + b + 1) - first
    n = tl.load(query_start_loc + b + 1) - tl.load(query_start_loc + b)
    m = tl.load(seq_lens + b)
    prefix = m - n
    byte = tl.program_id(1) * TILE + tl.arange(0, TILE)
    value = tl.zeros([TILE], dtype=tl.int32)
    for bit in tl.static_range(8):
        place = byte.to(tl.int64) * 8 + bit
        width = tl.maximum(m, 1)
        i = (place // width).to(tl.int32)
        j = (place % width).to(tl.int32)
        live = (i < n) & (byte < count)
        query = prefix + i
        key = j
        if TREE:
            draft = live & (j >= tl.where(prefix < 0, m, prefix))
            seen = tl.load(visible + (b * drafts + i) * drafts + (j - prefix), mask=draft, other=1).to(tl.int32) > 0
            if WINDOW:
                query = prefix + tl.load(depths + b * drafts + i, mask=live, other=0)
                depth = tl.load(depths + b * drafts + (j - prefix), mask=draft, other=0)
                key = tl.where(draft, prefix + depth, j)
        else:
            seen = key <= query
        for s in range(num_spans):
            start = tl.load(spans + (b * num_spans + s) * 2)
            stop = tl.load(spans + (b * num_spans + s) * 2 + 1)
            seen = seen | ((query >= start) & (query < stop) & (key >= start) & (key < stop))
        if WINDOW:
            seen = seen & (key > query - window)
        value = value | tl.where(seen & live, 1 << bit, 0)
    tl.store(packed + first + byte, value.to(tl.uint8), mask=byte < count)


def launch_pack(
    batch: ForwardBatch, window: int | None, byte_starts: Tensor, packed: Tensor, longest: int, depths: Tensor | None
) -> None:
    """See `masks.pack`; ``depths`` int32, at least one for each draft, is filled where a windowed tree needs it."""
    if not longest:
        return
    tree, spans = batch.tree, batch.spans
    visible, drafts = packed, 0
    if tree is not None:
        drafts = tree.num_draft_tokens
        visible = tree.visible.contiguous().view(torch.uint8)
        if window is not None:
            rows = batch.batch_size * drafts
            depths = packed.new_empty(rows, dtype=torch.int32) if depths is None else depths
            _depths[(rows,)](visible, depths, drafts, Q=max(16, triton.next_power_of_2(drafts)), num_warps=1)
    _pack[(batch.batch_size, triton.cdiv(longest, 512))](
        packed, byte_starts, batch.seq_lens, batch.query_start_loc, visible,
        byte_starts if depths is None else depths, packed if spans is None else spans.contiguous(), window or 0,
        0 if spans is None else spans.shape[1], drafts,
        TREE=tree is not None, WINDOW=window is not None, TILE=512, num_warps=4,
    )  # fmt: skip


@triton.jit
def _fold(
    out, lse, sinks, folded, out_t, out_h, num_heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr, LSE: tl.constexpr
):  # fmt: skip
    # several warps load the same lse: what one of them stored in place, a later one would take for the library's
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    live = head < num_heads
    tile = live[:, None] & (column < width)[None, :]
    found = tl.load(lse + token * num_heads + head, mask=live, other=-float("inf")) * 0.6931471805599453
    sink = tl.load(sinks + head, mask=live, other=-float("inf")).to(tl.float32)
    top = tl.maximum(found, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp(found - top)
    total = weight + tl.exp(sink - top)
    safe = tl.where(total > 0, total, 1.0)
    place = out + token * out_t + head[:, None] * out_h + column[None, :]
    value = tl.load(place, mask=tile, other=0.0).to(tl.float32)
    value = tl.where(weight[:, None] > 0, value * (weight / safe)[:, None], 0.0)
    tl.store(place, value.to(out.dtype.element_ty), mask=tile)
    if LSE:
        tl.store(folded + token * num_heads + head, tl.where(total > 0, top + tl.log(safe), -float("inf")), mask=live)


def launch_fold(out: Tensor, lse: Tensor, sinks: Tensor, folded: Tensor | None) -> None:
    """See `sinks.fold_sinks`; the log-sum-exp goes to ``folded`` [T, Hq], if that is given: never to ``lse``."""
    tokens, heads, width = out.shape
    _fold[(tokens, triton.cdiv(heads, _HEADS))](
        out, lse, sinks, lse if folded is None else folded, *out.stride()[:2], heads, width,
        HEADS=_HEADS, WIDTH=triton.next_power_of_2(width), LSE=folded is not None, num_warps=4,
    )  # fmt: skip
