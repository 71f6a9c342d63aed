"""SGLang's KV pools seen as our KVCache, without a copy: one view for each sub-pool that layers share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attn_core.errors import ConfigError
from attn_core.runtime.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class PoolView:
    """Layers whose keys lie in the same slots. ``window_pool``: SGLang's slots must be looked up in its mapping."""

    layer_ids: tuple[int, ...]
    kv_cache: KVCache
    window_pool: bool = False


def views_of(pool: Any, layer_ids: Iterable[int], page_size: int) -> list[PoolView]:
    """The views that ``layer_ids`` need. Raises ConfigError for a pool whose memory is laid out in another way."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    ids = tuple(layer_ids)
    if type(pool) is not SWAKVPool:
        return [PoolView(ids, _cache(pool, pool, ids, page_size))]
    views = []
    for window, part in ((False, pool.full_kv_pool), (True, pool.swa_kv_pool)):
        members = tuple(i for i in ids if pool.layers_mapping[i][1] is window)
        if members:
            views.append(PoolView(members, _cache(pool, part, members, page_size), window))
    return views


def _cache(pool: Any, part: Any, layer_ids: tuple[int, ...], page_size: int) -> KVCache:
    """The memory of ``part``, whose layers ``pool`` gives by their ids."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    if type(part) is MLATokenToKVPool and not part.use_dsa:
        latent = {i: _paged(pool.get_key_buffer(i), page_size)[:, :, 0] for i in layer_ids}
        return KVCache(latent, dict.fromkeys(latent), page_size=page_size, layout="MLA")
    known = type(part) is MHATokenToKVPool and not part.is_quantized_kv_cache
    if not known or part.kv_cache_layout not in ("nhd", "hnd"):
        raise ConfigError(
            f"a KV pool of type {type(part).__name__} ({getattr(part, 'kv_cache_layout', 'its own layout')})",
            accepted="MHATokenToKVPool in NHD or HND, MLATokenToKVPool, SWAKVPool of these; not quantized to 4 bits",
            hint="choose one of SGLang's own attention backends, or the default KV cache",
        )
    if part.kv_cache_layout == "hnd":
        keys = {i: pool.get_key_buffer(i) for i in layer_ids}
        values: dict[int, Tensor | None] = {i: pool.get_value_buffer(i) for i in layer_ids}
        return KVCache(keys, values, page_size=page_size, layout="HND")
    keys = {i: _paged(pool.get_key_buffer(i), page_size) for i in layer_ids}
    values = {i: _paged(pool.get_value_buffer(i), page_size) for i in layer_ids}
    return KVCache(keys, values, page_size=page_size, layout="NHD")


def _paged(rows: Tensor, page_size: int) -> Tensor:
    """Slots [n, H, D] as pages [n / page_size, page_size, H, D]: a view, whatever the strides."""
    pages, stride = rows.shape[0] // page_size, rows.stride(0)
    return rows.as_strided(
        (pages, page_size, *rows.shape[1:]), (stride * page_size, stride, *rows.stride()[1:]), rows.storage_offset()
    )
