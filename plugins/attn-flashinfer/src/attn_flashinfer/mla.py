"""The backend `flashinfer_mla`: absorbed MLA over the paged latent, and expanded prefill at 192/128."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from attn_core.errors import BatchError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_flashinfer.choice import compute_capability
from attn_flashinfer.library import RAISED, errors_of, load, raised
from attn_flashinfer.mla_graphs import MLAGraphPlanner
from attn_flashinfer.mla_plan import LatentShape, MLAStep, plan_latent
from attn_flashinfer.modules import missing_modules
from attn_flashinfer.page_indices import PageIndices, on_host
from attn_flashinfer.ragged import RaggedForward, RaggedPlans, nothing, writable
from attn_flashinfer.warmup import smallest_steps
from attn_flashinfer.wrappers import WrapperPool, workspace


class BoundLatent(NamedTuple):
    """What stays the same of a layer from step to step: its shape, the widths of latent and rotary part, both pools,
    how many heads are added, its scales.
    """

    layer: AttentionLayer
    shape: LatentShape
    widths: tuple[int, int]
    pools: tuple[Tensor, Tensor]
    added_heads: int
    scales: dict[str, float]


class FlashInferMLABackend(RaggedForward):
    """FlashInfer MLA: decode, chain verify and prefill are one kernel, causal where a request has several tokens."""

    name = "flashinfer_mla"
    cuda_graph_seq_len_fill_value = 1

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._library = load()
        self._kernels = "fa3" if compute_capability(kv_cache.device) == (9, 0) else "fa2"
        self._pool = WrapperPool()
        self._ragged = RaggedPlans(kv_cache.device)
        self._graphs: MLAGraphPlanner | None = None
        cached = [kind for kind in config.cached_kinds if kind.kind == "mla"]
        self._shapes = list(dict.fromkeys(LatentShape.of(kind) for kind in cached))
        self._scaled = kv_cache.dtype in FP8_DTYPES
        self._bound: dict[int, BoundLatent] = {}

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        return tuple(missing_modules(config, phase))

    def warmup(self, config: AttentionConfig) -> None:
        """Build or load every module that ``config`` needs."""
        for batch in smallest_steps(config.replace(speculative_eagle_topk=1), self.kv_cache):
            batch.spans = None
            self.init_forward_metadata(batch)
        self._warm_ragged(config)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        if batch.mode is ForwardMode.IDLE or not batch.num_tokens:
            batch.plan_state = None
            return
        _refuse_trees(batch)
        keys = PageIndices.of(batch.seq_lens_cpu, batch.page_table, self.kv_cache.page_size)
        step = batch.plan_state = MLAStep()
        for shape in self._shapes:
            step.wrappers[shape] = self._planned(batch, step, shape, keys)

    def _planned(self, batch: ForwardBatch, step: MLAStep, shape: LatentShape, keys: PageIndices) -> Any:
        def make() -> Any:
            with errors_of("a new wrapper"):
                return self._library.mla_wrapper(workspace(self.kv_cache.device), backend=self._kernels)

        lent = self._pool.lend(None, make, step)
        with errors_of(f"planning {batch.mode.name}"):
            lent.plan(
                plan_latent,
                lent.wrapper,
                self._library,
                shape,
                self.config,
                self.kv_cache,
                causal=batch.mode is not ForwardMode.DECODE,
                query_starts=on_host(batch.query_start_loc_cpu, "query_start_loc_cpu"),
                indptr=keys.indptr,
                indices=keys.indices,
                lens=keys.lens,
            )
        return lent.wrapper

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._graphs = MLAGraphPlanner(self.config, self.kv_cache, self._library, self._kernels, max_batch_size)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        _refuse_trees(batch)
        batch.plan_state = self._graph_planner().capture(batch, self._shapes)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self._graph_planner().replay(batch)

    def _graph_planner(self) -> MLAGraphPlanner:
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
            self.kv_cache.write(layer, batch.slot_mapping, k, v)
        if not q.shape[0]:
            return nothing(q, layer, return_lse)
        bound = self._bound.get(layer.layer_id)
        if bound is None or bound.layer is not layer:
            bound = self._bind(layer)
        _, shape, widths, pools, added, scales = bound
        try:
            wrapper = batch.plan_state.wrappers[shape]
        except (AttributeError, KeyError):
            raise BatchError(
                f"no plan for a layer of {shape}",
                hint="name all layer kinds in the config, and call init_forward_metadata",
            ) from None
        if added:
            q = torch.nn.functional.pad(q, (0, 0, 0, added))
        query = q.split_with_sizes(widths, -1)
        try:
            if out is None and not scales:  # without a dictionary of options
                rows, lse = wrapper.run(query=query, kv_cache=pools, return_lse=True, return_lse_base_on_e=True)
            else:
                into = None if out is None or added else writable(out)
                rows, lse = wrapper.run(
                    query=query, kv_cache=pools, out=into, return_lse=True, return_lse_base_on_e=True, **scales
                )
        except RAISED as error:
            raise raised(error, f"layer {layer.layer_id}") from error
        if added:
            rows, lse = rows[:, : shape.num_heads], lse[:, : shape.num_heads]
        if out is not None and rows is not out:
            rows = out.copy_(rows)
        return (rows, lse) if return_lse else rows

    forward_decode = forward_extend

    def _bind(self, layer: AttentionLayer) -> BoundLatent:
        shape, latent = LatentShape.of(layer), self.kv_cache.k(layer.layer_id)
        widths = (shape.latent_dim, shape.rope_dim)
        pools = (latent[..., : shape.latent_dim], latent[..., shape.latent_dim :])
        scales = {"ckv_scale": layer.k_scale, "kpe_scale": layer.k_scale} if self._scaled else {}
        bound = self._bound[layer.layer_id] = BoundLatent(
            layer, shape, widths, pools, shape.padded_heads - shape.num_heads, scales
        )  # fmt: skip
        return bound


def _refuse_trees(batch: ForwardBatch) -> None:
    if batch.tree is not None:
        raise BatchError("a tree of drafts over MLA", accepted="a chain", hint="plan with speculative_eagle_topk=1")
