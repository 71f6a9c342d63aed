"""CPU kernels of ATB's paged attention, for heads in two caches and for latent rows in one."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ascend.emulator.maths import attention, read_pages
from attn_ascend.emulator.rules import need

_DTYPES = (torch.float16, torch.bfloat16)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """One query a row: out [T, heads, D] over each request's whole context."""
    _check_form(query, key_cache, out, num_kv_heads, num_heads, out_width=query.shape[-1])
    need(
        value_cache.shape == key_cache.shape and value_cache.is_contiguous(),
        "paged_shape",
        _shapes(key_cache, value_cache),
    )
    need(query.shape[-1] <= 256, "paged_width", f"heads of {query.shape[-1]}")
    lengths = _check_requests(query, key_cache, block_table, context_lens)
    for i, count in enumerate(lengths):
        k = read_pages(key_cache, block_table[i], count, num_kv_heads, "paged_ids")
        v = read_pages(value_cache, block_table[i], count, num_kv_heads, "paged_ids")
        out[i] = attention(query[i : i + 1], k, v, scale_value, None)[0][0].to(out.dtype)


def paged_latent_attention(
    query: Tensor,
    key_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    mla_vheadsize: int,
    out: Tensor,
) -> None:
    """The same over latent rows, whose first ``mla_vheadsize`` are the values."""
    need(num_kv_heads == 1, "paged_latent_heads", f"{num_kv_heads} kv heads")
    _check_form(query, key_cache, out, num_kv_heads, num_heads, out_width=mla_vheadsize)
    width = query.shape[-1]
    need(0 < mla_vheadsize <= width <= 576, "paged_latent_width", f"rows of {width}, values of {mla_vheadsize}")
    need(query.shape[0] <= 8192, "paged_latent_batch", f"{query.shape[0]} requests")
    lengths = _check_requests(query, key_cache, block_table, context_lens)
    for i, count in enumerate(lengths):
        rows = read_pages(key_cache, block_table[i], count, 1, "paged_ids")
        out[i] = attention(query[i : i + 1], rows, rows[..., :mla_vheadsize], scale_value, None)[0][0].to(out.dtype)


def _check_form(query: Tensor, cache: Tensor, out: Tensor, kv_heads: int, heads: int, *, out_width: int) -> None:
    dtypes = {query.dtype, cache.dtype, out.dtype}
    need(len(dtypes) == 1 and query.dtype in _DTYPES, "paged_dtype", f"dtypes {sorted(map(str, dtypes))}")
    need(query.dim() == 3 and cache.dim() == 4, "paged_shape", _shapes(query, cache))
    axes = query.shape[1] == heads and cache.shape[2:] == (kv_heads, query.shape[2])
    need(axes and out.shape == (query.shape[0], heads, out_width), "paged_shape", _shapes(query, cache, out))
    need(all(t.is_contiguous() for t in (query, cache, out)), "paged_shape", "a tensor that is not contiguous")
    need(heads % kv_heads == 0, "paged_heads", f"{heads} query heads, {kv_heads} kv heads")
    need(cache.shape[1] % 16 == 0 and cache.shape[1] <= 128, "paged_block", f"blocks of {cache.shape[1]}")


def _check_requests(query: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> list[int]:
    given = f"context_lens {lengths.dtype} {tuple(lengths.shape)} on {lengths.device.type}"
    host = lengths.device.type == "cpu" and lengths.dtype == torch.int32
    need(host and lengths.shape == (query.shape[0],), "paged_lengths", given)
    form = (
        table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == query.shape[0] and table.is_contiguous()
    )
    need(form, "paged_table", f"block_table {table.dtype} {tuple(table.shape)} for {query.shape[0]} queries")
    counts: list[int] = lengths.tolist()
    need(min(counts, default=0) >= 0, "paged_lengths", f"context_lens {counts}")
    need(
        max(counts, default=0) <= table.shape[1] * cache.shape[1],
        "paged_table",
        f"{table.shape[1]} columns for {max(counts)} keys",
    )
    return counts


def _shapes(*tensors: Tensor) -> str:
    return "shapes " + ", ".join(str(tuple(t.shape)) for t in tensors)
