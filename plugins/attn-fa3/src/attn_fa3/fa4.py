"""The backend `fa4`: FlashAttention 4 (CuTe) over the paged cache, without trees of drafts and without split keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Final, NamedTuple, cast

import torch
from attn_core.errors import BatchError, ConfigError, KernelError, PluginLoadError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_fa3.calls import Attended
from attn_fa3.graph_buffers import GraphBuffers
from attn_fa3.pools import Pools
from attn_fa3.step import Step

#: The arguments that we name.
ARGUMENTS: Final = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k", "page_table",
    "softmax_scale", "causal", "window_size", "learnable_sink", "softcap", "num_splits", "return_lse",
)  # fmt: skip


@cache
def load() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """``flash_attn.cute.flash_attn_varlen_func``. Raises PluginLoadError if it cannot be imported or has changed."""
    try:
        function = import_module("flash_attn.cute").flash_attn_varlen_func
    except (ImportError, OSError, AttributeError) as error:
        raise PluginLoadError(
            f"flash_attn.cute cannot be imported: {error}", hint="pip install 'attn-fa3[fa4]'"
        ) from error
    missing = [name for name in ARGUMENTS if name not in inspect.signature(function).parameters]
    if missing:
        raise PluginLoadError(
            f"flash_attn_varlen_func has no argument {', '.join(missing)}",
            accepted=ARGUMENTS,
            hint="install a version that the manifest of fa4 names",
        )
    return cast("Callable[..., tuple[Tensor, Tensor | None]]", function)


def options_of(layer: AttentionLayer, *, causal: bool) -> dict[str, Any]:
    """What every call of the library for this layer is given."""
    window = (None, None) if layer.sliding_window is None else (layer.sliding_window - 1, 0)
    return {
        "softmax_scale": layer.scale, "causal": causal, "window_size": window, "learnable_sink": layer.sinks,
        "softcap": layer.softcap, "num_splits": 1,
    }  # fmt: skip


class BoundLayer(NamedTuple):
    """What stays the same of a layer from step to step."""

    layer: AttentionLayer
    pools: Pools
    options: dict[str, Any]

    @classmethod
    def of(cls, layer: AttentionLayer, pools: Pools) -> BoundLayer:
        return cls(layer, pools, options_of(layer, causal=not layer.cross))


class FA4Backend(AttentionBackend):
    """FlashAttention 4. Compiles a kernel when it first meets a dtype, head size, mask or cap; `warmup` does so ahead.

    Keys are not split: one request with many keys keeps one part of the chip busy. Pages are kept smaller than a tile
    of keys: larger ones are loaded whole, and a NaN behind the end of a sequence would reach its result.
    """

    name = "fa4"
    cuda_graph_seq_len_fill_value = 0

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._attend = load()
        self._bound: dict[int, BoundLayer] = {}
        self._graphs: GraphBuffers | None = None

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._step(batch, in_graph=False)

    def _step(self, batch: ForwardBatch, *, in_graph: bool) -> Step:
        if batch.tree is not None:
            raise BatchError("a tree of drafts", accepted="a chain", hint="plan with speculative_eagle_topk=1")
        return Step.of(batch, self.kv_cache.page_size, num_splits=1, in_graph=in_graph)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._graphs = GraphBuffers(self.config, self.kv_cache, max_batch_size)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._step(self._graph_buffers().capture(batch), in_graph=True)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self._graph_buffers().refill(batch)

    def _graph_buffers(self) -> GraphBuffers:
        if self._graphs is None:
            raise BatchError("no graph state", hint="call init_cuda_graph_state first")
        return self._graphs

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if save_kv_cache and k is not None:
            slots = batch.encoder_slot_mapping if layer.cross else batch.slot_mapping
            if slots is not None:
                self.kv_cache.write(layer, slots, k, v)
        step = cast(Step, batch.plan_state)
        keys = step.encoder_keys if layer.cross else step.keys
        if keys is None:
            raise BatchError("a cross layer in a batch without encoder_seq_lens and encoder_page_table")
        bound = self._bound.get(layer.layer_id)
        if bound is None or bound.layer is not layer:
            bound = self._bound[layer.layer_id] = BoundLayer.of(layer, Pools.of(self.kv_cache, layer))
        rows: dict[str, Any] = {"seqused_k": keys.lens, "page_table": keys.page_table, **bound.options}
        n = step.query_len
        if n is None:
            rows["cu_seqlens_q"], rows["max_seqlen_q"] = step.query_start_loc, step.max_query_len
            shape = q
        else:
            shape = q.unsqueeze(1) if n == 1 else q.view(step.batch_size, n, *q.shape[1:])
        return self._call(shape, bound.pools.k, bound.pools.v, layer, rows, return_lse, out, q)

    forward_decode = forward_extend

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
        rows: dict[str, Any] = {
            "cu_seqlens_q": query_start_loc,
            "cu_seqlens_k": key_start_loc,
            "max_seqlen_q": max_query_len,
            "max_seqlen_k": max_key_len,
            **options_of(layer, causal=causal),
        }
        return self._call(q, k, v, layer, rows, return_lse, out, q)

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: AttentionLayer,
        rows: dict[str, Any],
        return_lse: bool,
        out: Tensor | None,
        flat: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q [B, S, Hq, D] or [T, Hq, D]; ``flat`` is q [T, Hq, D]. The result is [T, Hq, Dv] (, lse [T, Hq])."""
        if not flat.shape[0]:
            empty = flat.new_empty(0, layer.num_q_heads, layer.v_head_dim)
            return (empty, flat.new_empty(0, layer.num_q_heads, dtype=torch.float32)) if return_lse else empty
        try:
            found = self._attend(q, k, v, return_lse=return_lse, **rows)
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise KernelError(
                f"FlashAttention 4, layer {layer.layer_id}: {first_line}",
                hint="the cause is the library's own error; `attn verify fa4` shows whether this installation works",
            ) from error
        part = found if isinstance(found, Tensor) else found[0]
        result = part
        if part.dim() == 4:
            result = part.squeeze(1) if part.shape[1] == 1 else part.flatten(0, 1)
        if out is not None:
            result = out.copy_(result)
        return (result, Attended(part, cast(Tensor, found[1])).lse_rows()) if return_lse else result
