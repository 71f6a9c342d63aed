"""Reading keys and values out of the pages that a request names, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer


def read_tokens(
    kv_cache: KVCache, layer: AttentionLayer, page_ids: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Keys [S, Hkv, D] and values [S, Hkv, Dv] of tokens ``start`` to ``stop - 1`` of the request in ``page_ids`` [n].

    Only pages that hold such a token are read, and only their rows.
    """
    size = kv_cache.page_size
    first = start // size
    ids = page_ids[first : -(-stop // size)]
    rows = slice(start - first * size, stop - first * size)
    k = gather_pages(kv_cache.k_nhd(layer.layer_id), ids).flatten(0, 1)[rows]
    if layer.kind == "mla":
        k = dequantize(k, layer.k_scale)
        return k, k[..., : layer.v_head_dim]
    v = gather_pages(kv_cache.v_nhd(layer.layer_id), ids).flatten(0, 1)[rows]
    return dequantize(k, layer.k_scale), dequantize(v, layer.v_scale)


def gather_pages(pool: Tensor, ids: Tensor) -> Tensor:
    """The pages ``ids`` (any shape) of pool [pages, page_size, H, D]; fp8 is copied as bytes: every device can."""
    if pool.dtype in FP8_DTYPES:
        return pool.view(torch.uint8)[ids].view(pool.dtype)
    return pool[ids]


def dequantize(rows: Tensor, scale: float) -> Tensor:
    """fp8 rows times their scale in fp32; other dtypes as they are."""
    if rows.dtype in FP8_DTYPES:
        return rows.float() * scale
    return rows if scale == 1.0 else rows.float() * scale
