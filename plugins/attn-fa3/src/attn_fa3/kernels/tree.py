"""The Triton kernel behind `own_keys`: one program for a draft token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _own_keys(
    visible, prefix_lens, page_table, slots, counts,
    q, table_stride, table_width, page_size, page_stride, window,
    Q: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // q
    i = tl.program_id(0) % q
    column = tl.arange(0, Q)
    row = tl.arange(0, Q)
    inside = (row < q)[:, None] & (column < q)[None, :]
    mask = tl.load(visible + b * q * q + row[:, None] * q + column[None, :], mask=inside, other=0).to(tl.int32)
    depths = tl.sum(mask, 1) - 1
    mine = tl.load(visible + b * q * q + i * q + column, mask=column < q, other=0).to(tl.int32)
    depth = tl.sum(mine, 0) - 1
    prefix = tl.load(prefix_lens + b)
    low = 0
    high = 0
    if WINDOWED:
        mine = tl.where(depths > depth - window, mine, 0)
        low = tl.minimum(tl.maximum(prefix + depth - window + 1, 0), prefix)
        high = prefix
        if window > q:
            high = tl.minimum(tl.maximum(prefix + i - window + 1, 0), prefix)
        high = tl.maximum(high, low)
    base = slots + tl.program_id(0) * q
    table = page_table + b.to(tl.int64) * table_stride
    position = low + column
    page = tl.load(table + tl.minimum(position // page_size, table_width - 1), mask=column < high - low, other=0)
    tl.store(base + column, page * page_stride + position % page_size, mask=column < high - low)
    position = prefix + column
    page = tl.load(table + tl.minimum(position // page_size, table_width - 1), mask=(column < q) & (mine > 0), other=0)
    place = high - low + tl.cumsum(mine, 0) - 1
    tl.store(base + place, page * page_stride + position % page_size, mask=(column < q) & (mine > 0))
    tl.store(counts + tl.program_id(0), high - low + tl.sum(mine, 0))


def launch_own_keys(
    visible: Tensor, prefix_lens: Tensor, page_table: Tensor, page_size: int, page_stride: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """(slots [B*q, q], counts [B*q]) int32, as `OwnKeys` has them."""
    batch, q, _ = visible.shape
    slots = torch.zeros(batch * q, q, dtype=torch.int32, device=visible.device)
    counts = torch.empty(batch * q, dtype=torch.int32, device=visible.device)
    _own_keys[(batch * q,)](
        visible.contiguous().view(torch.uint8), prefix_lens, page_table, slots, counts,
        q, page_table.stride(0), page_table.shape[1], page_size, page_stride, window or 0,
        Q=max(16, triton.next_power_of_2(q)), WINDOWED=window is not None, num_warps=1,
    )  # fmt: skip
    return slots, counts
