"""TorchNativeBackend: every feature of the contract in plain torch, the default that is always there."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.flat import FlatStep
from attn_core.runtime.torch_native.graph_buffers import GraphBuffers
from attn_core.runtime.torch_native.maths import add_sink
from attn_core.runtime.torch_native.padded import PaddedStep
from attn_core.runtime.torch_native.requests import RequestsStep, attend_ragged
from attn_core.runtime.torch_native.step import MixedStep, Step, check_step

Result = Tensor | tuple[Tensor, Tensor]


class TorchNativeBackend(AttentionBackend):
    """Attention in plain torch operations, on any device that has them.

    Raises ConfigError for a layer kind that the contract gives no meaning: a cross layer with a window.
    """

    name: ClassVar[str] = "torch_native"
    cuda_graph_seq_len_fill_value: ClassVar[int] = 0

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        if any(kind.cross and kind.sliding_window is not None for kind in config.layers):
            raise ConfigError(
                "a cross layer with a sliding window",
                accepted="cross layers without a window: encoder keys have no position relative to the query",
            )
        self._graphs: GraphBuffers | None = None

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._step(batch)

    def _step(self, batch: ForwardBatch) -> Step | None:
        check_step(batch)
        if batch.mode is ForwardMode.IDLE:
            return None
        if batch.mode is ForwardMode.MIXED and batch.num_decodes:
            decode, extend = batch.split()
            return MixedStep(batch.slot_mapping, batch.num_decodes, self._decode_step(decode), RequestsStep.of(extend))
        return self._decode_step(batch) if batch.mode is ForwardMode.DECODE else RequestsStep.of(batch)

    def _decode_step(self, batch: ForwardBatch) -> Step:
        if batch.device.type == "cpu":
            return FlatStep(batch, batch.slot_mapping, self.kv_cache.page_size)
        return PaddedStep.of(batch, 1, self.kv_cache.page_size)

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
    ) -> Result:
        step: Step = batch.plan_state
        if q.shape[0] != batch.num_tokens:
            raise BatchError(f"q has {q.shape[0]} rows for {batch.num_tokens} tokens", accepted="one row a token")
        if save_kv_cache:
            self._store(k, v, layer, batch, step)
        result = step.attend(q, layer, self.kv_cache, return_lse or layer.sinks is not None)
        return _finish(result, q, layer, return_lse, out)

    def forward_decode(
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
    ) -> Result:
        return self.forward_extend(q, k, v, layer, batch, save_kv_cache=save_kv_cache, return_lse=return_lse, out=out)

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
    ) -> Result:
        if layer.sliding_window is not None and not causal:
            raise ConfigError(
                f"layer {layer.layer_id}: a window of {layer.sliding_window} on keys that are not causal",
                accepted="a window with causal=True",
            )
        need_lse = return_lse or layer.sinks is not None
        result = attend_ragged(q, k, v, layer, query_start_loc.tolist(), key_start_loc.tolist(), causal, need_lse)
        return _finish(result, q, layer, return_lse, out)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        longest = self.config.max_context_len or self.kv_cache.num_pages * self.kv_cache.page_size
        columns = min(self.kv_cache.num_pages, -(-longest // self.kv_cache.page_size))
        self._graphs = GraphBuffers(max_batch_size, max_num_tokens, columns, self.kv_cache.device)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        check_step(batch)
        batch.plan_state = self._graph_buffers().capture(batch, self.kv_cache.page_size)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._graph_buffers().replay(batch, self.kv_cache.page_size)

    def _graph_buffers(self) -> GraphBuffers:
        if self._graphs is None:
            raise ConfigError("a graph before its buffers", hint="call init_cuda_graph_state first")
        return self._graphs

    def _store(
        self, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, step: Step
    ) -> None:
        """Write k, v to the cache. Raises BatchError for what cannot be meant."""
        if layer.cross and k is None:
            return  # the encoder's keys were written in an earlier step
        slots = batch.encoder_slot_mapping if layer.cross else step.slot_mapping
        if k is None or slots is None:
            raise BatchError(
                f"layer {layer.layer_id}: {'no keys to store' if k is None else 'keys, and no slots for them'}",
                accepted="k and v with their slots (a cross layer's: encoder_slot_mapping), or save_kv_cache=False",
            )
        self.write_kv(k, v, layer, slots)


def _finish(
    result: tuple[Tensor, Tensor | None], q: Tensor, layer: AttentionLayer, return_lse: bool, out: Tensor | None
) -> Result:
    """The sink, the dtype of q, and ``out`` filled if given."""
    values, lse = result
    if layer.sinks is not None:
        assert lse is not None, "a step with sinks was asked for its lse"
        values, lse = add_sink(values, lse, layer.sinks)
    if out is None:
        out = values.to(q.dtype)
    else:
        out.copy_(values.reshape(out.shape))
    if not return_lse:
        return out
    assert lse is not None, "a step was asked for its lse"
    return out, lse
