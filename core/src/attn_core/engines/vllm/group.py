"""The layers that share one of vLLM's caches: that cache wrapped, the backends of the plan over it, and its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from attn_core.engines.vllm.batches import batch_of
from attn_core.engines.vllm.planning import draft_tokens
from attn_core.engines.vllm.served import Served
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.graph_batch import GraphShape, StaticBatch
from attn_core.runtime.kv_cache import KVCache, cache_dtype
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter

_GRAPH_MODES: Final = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY)


@dataclass(slots=True, eq=False)
class Step:
    """What vLLM hands to our layers in a step: the batch, and what runs it.

    ``writes_first``: there are prompts and decodes, which may run apart. vLLM shares a prefix as soon as it is
    scheduled, so one may read a page that the other fills in this step: all keys are written before any is read.
    """

    backend: PhaseRouter
    batch: ForwardBatch
    num_tokens: int
    writes_first: bool


class CacheGroup:
    """Wraps the caches of ``names`` without a copy and builds the plan over them, once vLLM has made them."""

    def __init__(self, served: Served, names: list[str], *, block_size: int) -> None:
        layers = {name: served.context[name] for name in names}
        caches = {served.layer_id(name): layer.kv_cache for name, layer in layers.items()}
        self._first = next(iter(layers.values()))
        self.memory = self._first.kv_cache.data_ptr()
        wrapped = wrap(caches, served.kinds(names)[0].qk_head_dim, cache_dtype(served.plan.config))
        assert wrapped.page_size == block_size, (wrapped.page_size, block_size)
        plan = served.group(names, page_size=wrapped.page_size, layout=wrapped.layout)
        self.router = build(plan, wrapped)
        for name, layer in layers.items():
            layer.impl.bind(self.router, _layer(self.router, layer, served.layer_id(name)))
        config = served.vllm_config
        self._verify_tokens = draft_tokens(config)
        self._exact = not (self._verify_tokens and config.scheduler_config.async_scheduling)
        self._host_lengths = any(chosen.backend.manifest.needs_host_lengths for chosen in plan.phases.values())
        self._spans = plan.config.bidirectional_spans
        self._max_requests = int(config.scheduler_config.max_num_seqs)
        self._max_seq_len = int(plan.config.max_context_len or config.model_config.max_model_len)
        self._buffers: dict[ForwardMode, StaticBatch] = {}
        self._captured: dict[tuple[ForwardMode, int], ForwardBatch] = {}

    @property
    def stands(self) -> bool:
        """Whether vLLM still has the memory that was wrapped."""
        return bool(self._first.kv_cache.data_ptr() == self.memory)

    def batch(self, common: Any) -> ForwardBatch:
        """``common`` as a batch, with host lengths if a backend reads them."""
        batch = batch_of(common, verify_tokens=self._verify_tokens, exact_lengths=self._exact, spans=self._spans)
        if self._host_lengths and batch.seq_lens_cpu is None:
            batch.seq_lens_cpu = batch.seq_lens.cpu()
        return batch

    def step(self, common: Any) -> Step:
        """The step, prepared. Where a graph of its size was captured, in the buffers that the graph reads."""
        batch = self.batch(common)
        captured = self._captured.get((batch.mode, int(common.num_reqs)))
        if captured is None:
            self.router.init_forward_metadata(batch)
            return self._of(batch)
        self._buffers[batch.mode].fill(captured, batch)
        self.router.init_forward_metadata_replay_cuda_graph(captured)
        return self._of(captured)

    def captured_step(self, common: Any) -> Step:
        """The step that vLLM captures a graph of, or runs empty to keep time with other ranks: all of it padding."""
        batch, size = self.batch(common), int(common.num_reqs)
        if batch.mode not in _GRAPH_MODES or not self.router.config.cuda_graph:
            return self.step(common)
        key = batch.mode, size
        if key not in self._captured:
            captured = self._static(batch.mode).of_size(size)
            self.router.init_forward_metadata_capture_cuda_graph(captured)
            self._captured[key] = captured
        return self.step(common)

    def _static(self, mode: ForwardMode) -> StaticBatch:
        if not self._buffers:
            tokens = self._max_requests * max(1, self._verify_tokens)
            self.router.init_cuda_graph_state(self._max_requests, tokens)
        if mode not in self._buffers:
            shape = GraphShape(
                mode,
                max_seq_len=self._max_seq_len,
                query_len=1 if mode is ForwardMode.DECODE else self._verify_tokens,
            )
            self._buffers[mode] = StaticBatch(
                shape,
                self._max_requests,
                page_size=self.router.kv_cache.page_size,
                fill_value=self.router.cuda_graph_seq_len_fill_value,
                device=self.router.kv_cache.device,
            )
        return self._buffers[mode]

    def _of(self, batch: ForwardBatch) -> Step:
        return Step(self.router, batch, batch.num_tokens, batch.mode is ForwardMode.MIXED)


def wrap(caches: dict[int, Tensor], key_width: int, dtype: torch.dtype) -> KVCache:
    """vLLM's caches by layer id as a KVCache, by strides alone.

    MHA: [blocks, Hkv, block_size, Dk + Dv], a token's values behind its keys; MLA: [blocks, block_size, D].
    """
    seen = {layer_id: cache if cache.dtype is dtype else cache.view(dtype) for layer_id, cache in caches.items()}
    first = next(iter(seen.values()))
    if first.dim() == 3:
        return KVCache(seen, dict.fromkeys(seen), page_size=first.shape[1], layout="MLA")
    layout = "HND" if first.stride(1) > first.stride(2) else "NHD"
    if layout == "NHD":
        seen = {layer_id: cache.transpose(1, 2) for layer_id, cache in seen.items()}
    keys = {layer_id: cache[..., :key_width] for layer_id, cache in seen.items()}
    values: dict[int, Tensor | None] = {layer_id: cache[..., key_width:] for layer_id, cache in seen.items()}
    return KVCache(keys, values, page_size=first.shape[2], layout=layout)


def _layer(router: PhaseRouter, layer: Any, layer_id: int) -> AttentionLayer:
    """The layer as the backends see it, with the scales that were loaded with the weights."""
    scales = (
        {} if router.config.kv_cache_dtype == "auto"
        else {"k_scale": float(layer._k_scale_float), "v_scale": float(layer._v_scale_float)}
    )  # fmt: skip
    return AttentionLayer.of_kind(
        router.config.kind_of(layer_id), layer_id, sinks=getattr(layer.impl, "sinks", None), **scales
    )
