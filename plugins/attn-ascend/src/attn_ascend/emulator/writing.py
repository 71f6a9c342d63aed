"""CPU kernels of the cache writes: ATB's, which skip negative slots, and aclnn's, which takes none."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ascend.emulator.rules import need


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    """key, value [T, heads, D] to slots of their caches."""
    for rows, cache in ((key, key_cache), (value, value_cache)):
        _write(rows, cache, slot_indices, skips_negative=True)


def reshape_and_cache_siso(key: Tensor, key_cache: Tensor, slot_indices: Tensor) -> None:
    """The same for one cache."""
    _write(key, key_cache, slot_indices, skips_negative=True)


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """aclnn's write, scenario 2 of its docstring."""
    need(cache_mode in (None, "Norm"), "write_mode", f"cache_mode {cache_mode}")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        _write(rows, cache, slot_mapping, skips_negative=False)


def _write(rows: Tensor, cache: Tensor, slots: Tensor, *, skips_negative: bool) -> None:
    given = f"rows {rows.dtype} {tuple(rows.shape)}, cache {cache.dtype} {tuple(cache.shape)}"
    need(rows.numel() > 0 and cache.numel() > 0, "write_empty", given)
    form = rows.dim() == 3 and cache.dim() == 4 and rows.dtype == cache.dtype and rows.shape[1:] == cache.shape[2:]
    need(form and rows.is_contiguous() and cache.is_contiguous(), "write_form", given)
    dtypes = (torch.int32,) if skips_negative else (torch.int32, torch.int64)
    one_each = slots.dtype in dtypes and slots.shape == (rows.shape[0],)
    need(one_each, "write_slots", f"slots {slots.dtype} {tuple(slots.shape)} for {rows.shape[0]} rows")
    room = cache.shape[0] * cache.shape[1]
    lowest, highest = int(slots.min()), int(slots.max())
    need(highest < room and (skips_negative or lowest >= 0), "write_range", f"slots {lowest} to {highest} of {room}")
    kept = slots >= 0
    _check_distinct(rows[kept], slots[kept].long())
    cache.view(room, *cache.shape[2:])[slots[kept].long()] = rows[kept]


def _check_distinct(rows: Tensor, slots: Tensor) -> None:
    order = torch.argsort(slots, stable=True)
    ordered, bits = slots[order], rows[order].flatten(1).view(torch.int16)
    repeated = ordered[1:] == ordered[:-1]
    same = (bits[1:] == bits[:-1]).all(-1)
    need(bool((~repeated | same).all()), "write_twice", f"slots {ordered[1:][repeated & ~same].tolist()}")
