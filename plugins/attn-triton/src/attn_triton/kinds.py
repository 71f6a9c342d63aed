"""A layer bound to its cache: what the kernels need of it, looked up once and checked cheaply afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from attn_core.errors import ConfigError
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_triton.geometry import Geometry

LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Kind:
    """Everything of a layer that a kernel is compiled for or a step prepares for; layers of one kind share both."""

    geometry: Geometry
    window: int | None
    has_cap: bool
    sinks: torch.dtype | None
    cross: bool


@dataclass(slots=True, eq=False)
class BoundLayer:
    """A layer, its kind, its pools as [pages, page_size, Hkv, D] views, and a number for its kind that hashes in no
    time. ``pools``: their addresses.
    """

    layer: AttentionLayer
    kind: Kind
    number: int
    k_pool: Tensor
    v_pool: Tensor
    pools: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.pools = (self.k_pool.data_ptr(), self.v_pool.data_ptr())

    def still_fits(self, dtype: torch.dtype) -> bool:
        """Whether the layer still is what was bound, and ``dtype`` what its queries were."""
        kind, layer = self.kind, self.layer
        sinks = layer.sinks
        return (
            kind.geometry.dtype is dtype
            and kind.window == layer.sliding_window
            and kind.has_cap == (layer.softcap > 0)
            and kind.sinks is (None if sinks is None else sinks.dtype)
            and kind.cross is layer.cross
        )


def kind_of(layer: AttentionLayer, geometry: Geometry) -> Kind:
    """The kind of a layer. Raises ConfigError for what the definitions give no meaning."""
    if layer.cross and layer.sliding_window is not None:
        raise ConfigError(
            f"layer {layer.layer_id}: a window of {layer.sliding_window} on a cross layer",
            accepted="cross layers without a window: encoder keys have no position relative to the query",
        )
    if layer.softcap < 0:
        raise ConfigError(f"layer {layer.layer_id}: softcap {layer.softcap}", accepted="0 (off) or a positive cap")
    if layer.sinks is not None and (
        tuple(layer.sinks.shape) != (layer.num_q_heads,) or not layer.sinks.is_contiguous()
    ):
        raise ConfigError(
            f"layer {layer.layer_id}: sinks {tuple(layer.sinks.shape)}", accepted=f"contiguous [{layer.num_q_heads}]"
        )
    return Kind(
        geometry=geometry,
        window=layer.sliding_window,
        has_cap=layer.softcap > 0,
        sinks=None if layer.sinks is None else layer.sinks.dtype,
        cross=layer.cross,
    )


def bind_layer(layer: AttentionLayer, cache: KVCache, dtype: torch.dtype, numbers: dict[Kind, int]) -> BoundLayer:
    """``layer`` over its pools in ``cache``; ``numbers`` gives every kind seen so far its number."""
    kind = kind_of(layer, Geometry.of_cache(layer, cache, dtype))
    k_pool = cache.k_nhd(layer.layer_id)
    v_pool = k_pool if layer.kind == "mla" else cache.v_nhd(layer.layer_id)
    return BoundLayer(layer, kind, numbers.setdefault(kind, len(numbers)), k_pool, v_pool)


def score_scale(layer: AttentionLayer) -> tuple[float, float]:
    """``scale`` and ``cap`` as the kernels take them, log2(e) and the cache's key scale in them. Raises ConfigError."""
    scale = layer.scale * layer.k_scale
    if not scale > 0:
        raise ConfigError(
            f"layer {layer.layer_id}: scale {layer.scale}, k_scale {layer.k_scale}", accepted="numbers greater than 0"
        )
    if layer.softcap:
        return scale / layer.softcap, layer.softcap * LOG2E
    return scale * LOG2E, 0.0


def value_scale(layer: AttentionLayer) -> float:
    """What a stored value is multiplied by; an MLA layer's values lie in its keys, and have their scale."""
    return float(layer.k_scale if layer.kind == "mla" else layer.v_scale)
