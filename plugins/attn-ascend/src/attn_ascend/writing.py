"""Keys and values into the cache, by the vendor's operator that is here."""

from __future__ import annotations

import torch
from attn_core.errors import BatchError
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_ascend.operators import Operators


def write(
    operators: Operators, cache: KVCache, layer: AttentionLayer, k: Tensor | None, v: Tensor | None, slots: Tensor
) -> None:
    """k [T, Hkv, Dk], v [T, Hkv, Dv] (None for MLA) to int32 ``slots`` [T] of a layer's pages; -1 is not written.

    ATB's operators skip negative slots. aclnn's takes none, so a row of -1 rewrites slot 0, which lies in the null
    page, with what is there. Without either, or in a cache of strides, the core's own write in plain torch does it.
    Raises BatchError if what the layer stores is not given.
    """
    key_cache, value_cache = cache.k(layer.layer_id), cache.v(layer.layer_id)
    if k is None or (v is None) != (value_cache is None):
        missing = "keys" if k is None else "values" if v is None else "place for values"
        raise BatchError(
            f"layer {layer.layer_id}: no {missing} to store", accepted="k and v (MLA: k alone), or save_kv_cache=False"
        )
    if k.shape[0] == 0:
        return
    k = k.to(cache.dtype).contiguous()
    if value_cache is None or v is None:
        if operators.write_latent and key_cache.is_contiguous():
            operators.write_latent_cache(k, key_cache.unsqueeze(2), slots)
        else:
            cache.write(layer, slots, k, None)
        return
    v = v.to(cache.dtype).contiguous()
    contiguous = key_cache.is_contiguous() and value_cache.is_contiguous()
    if operators.write and contiguous:
        operators.write_cache(k, v, key_cache, value_cache, slots)
    elif operators.scatter and contiguous:
        skip = (slots < 0)[:, None, None]
        k, v = torch.where(skip, key_cache[0, 0], k), torch.where(skip, value_cache[0, 0], v)
        operators.scatter_cache(k, v, key_cache, value_cache, slots.clamp(min=0))
    else:
        cache.write(layer, slots, k, v)
