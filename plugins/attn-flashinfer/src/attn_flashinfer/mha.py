"""The backend `flashinfer`: paged multi-head and grouped-query attention in every phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from attn_core.errors import BatchError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_flashinfer.choice import LayerShape
from attn_flashinfer.graphs import GraphPlanner, GraphStep
from attn_flashinfer.library import RAISED, load, raised
from attn_flashinfer.modules import missing_modules
from attn_flashinfer.ragged import RaggedForward, RaggedPlans, finish, nothing, writable
from attn_flashinfer.step import Step, StepPlanner
from attn_flashinfer.warmup import smallest_steps


class BoundLayer(NamedTuple):
    """What stays the same of a layer from step to step."""

    layer: AttentionLayer
    shape: LayerShape
    pools: tuple[Tensor, Tensor]
    scales: dict[str, float]


class FlashInferBackend(RaggedForward):
    """FlashInfer. Plans each step on the host from the batch's host lengths, one wrapper for each shape of layer.

    Trees of drafts and bidirectional spans go through packed masks; fa2 or fa3 is chosen by what a step needs.
    """

    name = "flashinfer"
    cuda_graph_seq_len_fill_value = 1

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._steps = StepPlanner(config, kv_cache)
        self._ragged = RaggedPlans(kv_cache.device)
        self._graphs: GraphPlanner | None = None
        self._shapes = list(dict.fromkeys(LayerShape.of(kind) for kind in config.cached_kinds))
        self._scaled = kv_cache.dtype in FP8_DTYPES
        self._bound: dict[int, BoundLayer] = {}

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        return tuple(missing_modules(config, phase))

    def warmup(self, config: AttentionConfig) -> None:
        """Build or load every module that ``config`` needs: minutes, if FlashInfer has not compiled them yet."""
        for batch in smallest_steps(config, self.kv_cache):
            self.init_forward_metadata(batch)
        self._warm_ragged(config)

    # -- the step ------------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        if batch.mode is ForwardMode.IDLE or not batch.num_tokens:
            batch.plan_state = None
            return
        step = batch.plan_state = self._steps.step(batch)
        for shape in self._shapes_of(batch):
            self._steps.wrapper(batch, step, shape)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._graphs = GraphPlanner(self.config, self.kv_cache, load(), max_batch_size)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._graph_planner().capture(batch, self._shapes_of(batch))

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        """One kernel for the page indices, and the library's own planner for each shape of layer."""
        self._graph_planner().replay(batch)

    def _graph_planner(self) -> GraphPlanner:
        if self._graphs is None:
            raise BatchError("no graph state", hint="call init_cuda_graph_state first")
        return self._graphs

    def _shapes_of(self, batch: ForwardBatch) -> list[LayerShape]:
        """The shapes of the config's layers that this batch has keys for."""
        return [shape for shape in self._shapes if not shape.cross or batch.encoder_seq_lens is not None]

    # -- the layer -----------------------------------------------------------------------------------------------------

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
        if not q.shape[0]:
            return nothing(q, layer, return_lse)
        bound = self._bound.get(layer.layer_id)
        if bound is None or bound.layer is not layer:
            bound = self._bind(layer)
        wrapper = self._wrapper(bound.shape, batch)
        wants_lse = return_lse or layer.sinks is not None
        try:
            found = wrapper.run(q, bound.pools, out=writable(out), return_lse=wants_lse, **bound.scales)
        except RAISED as error:
            raise raised(error, f"layer {layer.layer_id}") from error
        return finish(found, layer.sinks, return_lse, out)

    forward_decode = forward_extend

    def _wrapper(self, shape: LayerShape, batch: ForwardBatch) -> Any:
        step = batch.plan_state
        if isinstance(step, GraphStep):
            if shape not in step.wrappers:
                raise BatchError(
                    f"a layer of {shape} in a graph that was planned for {list(step.wrappers)}",
                    hint="name all layer kinds in the config",
                )
            return step.wrappers[shape]
        if not isinstance(step, Step):
            raise BatchError("a batch without metadata", hint="call init_forward_metadata first")
        return self._steps.wrapper(batch, step, shape)

    def _bind(self, layer: AttentionLayer) -> BoundLayer:
        v = self.kv_cache.v(layer.layer_id)
        assert v is not None, "an MHA layer in a latent cache"
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale} if self._scaled else {}
        bound = BoundLayer(layer, LayerShape.of(layer), (self.kv_cache.k(layer.layer_id), v), scales)
        self._bound[layer.layer_id] = bound
        return bound
