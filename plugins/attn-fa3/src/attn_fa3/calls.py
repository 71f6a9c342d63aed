"""The calls of the library: paged, over the slots of tree drafts, ragged, and the tile schedule that layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_fa3.library import Library, raised
from attn_fa3.pools import Pools
from attn_fa3.queries import quantize
from attn_fa3.step import Keys, Shape, Step
from attn_fa3.tree import OwnKeys

_RAISED = (RuntimeError, ValueError, TypeError)
#: Tiles of keys are multiples of 16 from 64 on, and tiles of queries have 64 rows or more.
_SMALLEST_KEY_TILE, _KEY_TILE_STEP, _SMALLEST_QUERY_TILE = 64, 16, 64


class Attended(NamedTuple):
    """What the library returned: out as it came, lse [B, H, S] of requests of one length, or [H, T]."""

    out: Tensor
    lse: Tensor

    def rows(self) -> Tensor:
        """out [T, Hq, Dv]."""
        return self.out.flatten(0, 1) if self.out.dim() == 4 else self.out

    def lse_rows(self) -> Tensor:
        """lse [T, Hq]."""
        if self.lse.dim() == 2:
            return self.lse.t()
        return self.lse.squeeze(2) if self.lse.shape[2] == 1 else self.lse.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class BoundLayer:
    """What stays the same of a layer from step to step: its pools, the shape of its schedule, its scales."""

    layer: AttentionLayer
    pools: Pools
    shape: Shape
    cache_scales: tuple[Tensor, Tensor] | None


class Calls:
    """The library, for one cache."""

    def __init__(self, library: Library, cache: KVCache) -> None:
        self.library = library
        self._cache = cache
        self._fp8 = cache.dtype == torch.float8_e4m3fn
        self._bound: dict[int, BoundLayer] = {}
        self._whole_tiles = cache.page_size >= _SMALLEST_KEY_TILE and not cache.page_size % _KEY_TILE_STEP
        self._no_padding: dict[int, Tensor] = {}

    def bind(self, layer: AttentionLayer) -> BoundLayer:
        """The layer's pools and shape, made when it is first seen."""
        found = self._bound.get(layer.layer_id)
        if found is None or found.layer is not layer:
            found = self._bound[layer.layer_id] = self._new(layer)
        return found

    def _new(self, layer: AttentionLayer) -> BoundLayer:
        pools = Pools.of(self._cache, layer)
        window = (-1, -1) if layer.sliding_window is None else (layer.sliding_window - 1, 0)
        shape = Shape(
            layer.num_q_heads,
            layer.num_kv_heads,
            pools.k.shape[-1],
            pools.v.shape[-1],
            window,
            not layer.cross,
            layer.softcap > 0,
        )
        scales = None
        if self._fp8:
            one = torch.ones(1, 1, device=self._cache.device)
            scales = (one * layer.k_scale, one * layer.v_scale)
        return BoundLayer(layer, pools, shape, scales)

    def attend(
        self,
        q: Tensor,
        bound: BoundLayer,
        step: Step,
        keys: Keys,
        shape: Shape,
        *,
        out: Tensor | None = None,
    ) -> Attended:
        """This step's queries over ``keys``; into ``out`` [T, Hq, Dv] if given."""
        layer, pools, uniform = bound.layer, bound.pools, step.query_len
        options: dict[str, Any] = dict(self._token_loads(step, shape))
        if self._fp8:
            q = self._quantized(q, bound, step, 1, options)
        if uniform is None:
            options["cu_seqlens_q"] = step.query_start_loc
            options["max_seqlen_q"] = step.max_query_len
        else:
            q = q.view(step.batch_size, uniform, *q.shape[1:])
            out = None if out is None else out.view(step.batch_size, uniform, *out.shape[1:])
        if layer.kind == "mla":
            options["q_v"] = q[..., : layer.v_head_dim]
            q = q[..., layer.v_head_dim :]
        try:
            result = self.library.forward(
                q=q,
                k=pools.k,
                v=pools.v,
                out=out,
                seqused_k=keys.lens,
                page_table=keys.page_table,
                softmax_scale=layer.scale,
                is_causal=shape.causal,
                window_size_left=shape.window[0],
                window_size_right=shape.window[1],
                softcap=layer.softcap,
                scheduler_metadata=self._schedule(step, keys, shape, layer.layer_id),
                num_splits=step.num_splits,
                **options,
            )
        except _RAISED as error:
            raise raised(error, f"layer {layer.layer_id}") from error
        return Attended(result[0], result[1])

    def _token_loads(self, step: Step, shape: Shape) -> dict[str, Tensor]:
        """What makes the library load keys token by token: that requests may begin inside pages, as none does.

        Many queries over pages that are whole tiles of keys it loads a tile at a time, with what lies behind the end of
        the sequence: a NaN there, times a probability of 0, is NaN.
        """
        if not self._whole_tiles:
            return {}
        queries = step.max_query_len if step.query_len is None else step.query_len
        if queries * (shape.num_q_heads // shape.num_kv_heads) <= _SMALLEST_QUERY_TILE:
            return {}
        b = step.batch_size
        if b not in self._no_padding:
            self._no_padding[b] = torch.zeros(b, dtype=torch.int32, device=self._cache.device)
        return {"leftpad_k": self._no_padding[b]}

    def attend_own(self, q: Tensor, bound: BoundLayer, step: Step, own: OwnKeys) -> Attended:
        """Each draft as a request of one token, over the slots listed for it."""
        layer, pools = bound.layer, bound.pools.as_slots()
        options: dict[str, Any] = {}
        if self._fp8:
            q = self._quantized(q, bound, step, q.shape[0] // step.batch_size, options)
        q = q.unsqueeze(1)
        if layer.kind == "mla":
            options["q_v"] = q[..., : layer.v_head_dim]
            q = q[..., layer.v_head_dim :]
        try:
            result = self.library.forward(
                q=q,
                k=pools.k,
                v=pools.v,
                seqused_k=own.counts,
                page_table=own.slots,
                softmax_scale=layer.scale,
                is_causal=False,
                softcap=layer.softcap,
                num_splits=1,
                **options,
            )
        except _RAISED as error:
            raise raised(error, f"layer {layer.layer_id}, the drafts of a tree") from error
        return Attended(result[0], result[1])

    def attend_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, *, causal: bool, out: Tensor | None, **given: Any
    ) -> Attended:
        """Queries over keys that are given; ``given`` are the start locations and longest lengths of both."""
        windowed = layer.sliding_window is not None
        try:
            result = self.library.forward(
                q=q,
                k=k,
                v=v,
                out=out,
                softmax_scale=layer.scale,
                is_causal=causal,
                window_size_left=layer.sliding_window - 1 if layer.sliding_window is not None else -1,
                window_size_right=0 if windowed else -1,
                softcap=layer.softcap,
                num_splits=1,
                **given,
            )
        except _RAISED as error:
            raise raised(error, f"layer {layer.layer_id}, ragged") from error
        return Attended(result[0], result[1])

    def _quantized(self, q: Tensor, bound: BoundLayer, step: Step, repeat: int, options: dict[str, Any]) -> Tensor:
        """The queries in e4m3; what they and the stored keys and values are multiplied with goes to ``options``.

        ``repeat``: how many requests the library is told each of the step's is.
        """
        starts = step.query_start_loc if step.query_len is None else None
        found = quantize(q, bound.layer.num_kv_heads, step.batch_size, starts)
        q_descale = found.descale if repeat == 1 else found.descale.repeat_interleave(repeat, 0)
        assert bound.cache_scales is not None, "an fp8 cache without scales"
        k_descale, v_descale = (scale.expand_as(q_descale) for scale in bound.cache_scales)
        options |= {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        return found.q

    def _schedule(self, step: Step, keys: Keys, shape: Shape, layer_id: int) -> Tensor:
        """The tile schedule of every layer of ``shape`` in this step: one small kernel instead of one a layer."""
        key = (shape, keys.kind)
        found = step.schedules.made.get(key)
        if found is not None and not step.schedules.in_graph:
            return found[1]
        return step.schedules.get(key, layer_id, lambda: self._new_schedule(step, keys, shape))

    def _new_schedule(self, step: Step, keys: Keys, shape: Shape) -> Tensor:
        uniform = step.query_len
        try:
            return self.library.schedule(
                batch_size=step.batch_size,
                max_seqlen_q=step.max_query_len if uniform is None else uniform,
                max_seqlen_k=keys.max_len,
                num_heads=shape.num_q_heads,
                num_heads_k=shape.num_kv_heads,
                headdim=shape.qk_head_dim,
                headdim_v=shape.v_head_dim,
                qkv_dtype=self._cache.dtype,
                seqused_k=keys.lens,
                cu_seqlens_q=step.query_start_loc if uniform is None else None,
                page_size=self._cache.page_size,
                is_causal=shape.causal,
                window_size_left=shape.window[0],
                window_size_right=shape.window[1],
                has_softcap=shape.has_softcap,
                num_splits=step.num_splits,
                **self._token_loads(step, shape),
            )
        except _RAISED as error:
            raise raised(error, "tile schedule") from error
