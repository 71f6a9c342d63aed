"""Attention over keys that are given, for both backends: vision encoders, and expanded MLA prefill at 192/128."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from attn_core.errors import ConfigError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.kv_cache import TORCH_DTYPES
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_flashinfer.choice import LayerShape, takes_fa3
from attn_flashinfer.library import errors_of, load
from attn_flashinfer.sinks import LN2, fold_sinks
from attn_flashinfer.wrappers import PlannedWrapper, workspace


class RaggedPlans:
    """Ragged wrappers, one for each shape of layer, planned again only when the starts are others than last time.

    Planning reads the starts on the host: with starts on the device this stops it, once a step and shape, which the
    library forces. The layers of a step pass the same tensors, so all but the first find the plan made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wrappers: dict[object, PlannedWrapper] = {}
        self._planned_for: dict[object, tuple[object, ...]] = {}

    def get(self, shape: LayerShape, dtype: torch.dtype, causal: bool, queries: Tensor, keys: Tensor) -> Any:
        """The wrapper, planned for these starts [B + 1]."""
        kind = (shape, dtype, causal)
        kernels = "fa3" if takes_fa3(shape, dtype, self._device) else "fa2"
        if kind not in self._wrappers:
            with errors_of("a new ragged wrapper"):
                wrapper = load().ragged_wrapper(workspace(self._device), kv_layout="NHD", backend=kernels)
            self._wrappers[kind] = PlannedWrapper(wrapper)
        planned = self._wrappers[kind]
        if not self._is_planned_for(kind, queries, keys):
            with errors_of("planning a ragged call"):
                planned.plan(
                    planned.wrapper.plan,
                    qo_indptr=queries.cpu(),
                    kv_indptr=keys.cpu(),
                    num_qo_heads=shape.num_q_heads,
                    num_kv_heads=shape.num_kv_heads,
                    head_dim_qk=shape.qk_head_dim,
                    head_dim_vo=shape.v_head_dim,
                    causal=causal,
                    window_left=-1 if shape.window is None else shape.window - 1,
                    logits_soft_cap=shape.softcap,
                    sm_scale=shape.scale,
                    q_data_type=dtype,
                    kv_data_type=dtype,
                )
            self._planned_for[kind] = (weakref.ref(queries), _version(queries), weakref.ref(keys), _version(keys))
        return planned.wrapper

    def _is_planned_for(self, kind: object, queries: Tensor, keys: Tensor) -> bool:
        found = self._planned_for.get(kind)
        if found is None:
            return False
        last_queries, query_version, last_keys, key_version = found
        if queries.is_inference() or keys.is_inference():
            return False  # nobody counts what is written to them
        same = last_queries() is queries and last_keys() is keys  # type: ignore[operator]
        return same and (query_version, key_version) == (_version(queries), _version(keys))


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` was written to, -1 for one of inference mode."""
    return -1 if tensor.is_inference() else tensor._version


class RaggedForward(AttentionBackend):
    """`forward_ragged` for a backend that has ``_ragged``."""

    _ragged: RaggedPlans

    def _warm_ragged(self, config: AttentionConfig) -> None:
        """Plan one query over one key for every ragged kind of layer, which builds its module."""
        starts = torch.tensor([0, 1], dtype=torch.int32, device=self.kv_cache.device)
        for kind in config.layers:
            if kind.ragged:
                self._ragged.get(LayerShape.of(kind), TORCH_DTYPES[config.dtype], kind.causal, starts, starts)

    def forward_ragged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: AttentionLayer,
        *,
        query_start_loc: Tensor,
        key_start_loc: Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if layer.sliding_window is not None and not causal:
            raise ConfigError(
                f"layer {layer.layer_id}: a window of {layer.sliding_window} on keys that are not causal",
                accepted="a window with causal=True",
            )
        if not q.shape[0]:
            return nothing(q, layer, return_lse)
        wrapper = self._ragged.get(LayerShape.of(layer), q.dtype, causal, query_start_loc, key_start_loc)
        wants_lse = return_lse or layer.sinks is not None
        with errors_of(f"layer {layer.layer_id}, ragged"):
            found = wrapper.run(q, k, v, out=writable(out), return_lse=wants_lse)
        return finish(found, layer.sinks, return_lse, out)


def writable(out: Tensor | None) -> Tensor | None:
    """``out`` if the kernels can write into it: they take it as contiguous, whatever its strides."""
    return out if out is not None and out.is_contiguous() else None


def finish(found: Any, sinks: Tensor | None, return_lse: bool, out: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """What a wrapper returned, as the contract has it: sinks folded in, LSE natural, in the engine's ``out``.

    found: out [T, Hq, Dv], or that and lse [T, Hq] in base 2.
    """
    if isinstance(found, tuple):
        rows, lse = found
        if sinks is not None:
            lse = fold_sinks(rows, lse, sinks, return_lse=return_lse)
        else:
            lse.mul_(LN2)
    else:
        rows, lse = found, None
    if out is not None and rows is not out:
        rows = out.copy_(rows)
    return (rows, lse) if return_lse and lse is not None else rows


def nothing(q: Tensor, layer: AttentionLayer, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The outputs of no tokens."""
    out = q.new_empty(0, layer.num_q_heads, layer.v_head_dim)
    return (out, q.new_empty(0, layer.num_q_heads, dtype=torch.float32)) if return_lse else out
