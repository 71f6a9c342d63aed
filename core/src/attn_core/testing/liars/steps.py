"""Faults of steps and of claims: state on the backend, graphs, determinism, and who really runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing.liars.base import Mutant, Result, breaks


@breaks("flight")
class StateOnTheBackend(Mutant):
    """What was prepared lies on the backend, so that a second batch in flight overwrites the first one's."""

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        super().init_forward_metadata(batch)
        self.latest = batch.plan_state

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        same_size = self.latest.num_tokens == batch.num_tokens
        return self.honest(q, layer, self.latest if same_size else batch)


@breaks("steps", "flight")
class FirstStepForever(Mutant):
    """Metadata is prepared once for each number of requests and then kept."""

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self.first: dict[tuple[Any, ...], ForwardBatch] = {}

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        super().init_forward_metadata(batch)
        starts = tuple(batch.query_start_loc.tolist())
        shape = (batch.mode, starts, batch.page_table.data_ptr() if batch.page_table.shape[0] == 1 else None)
        batch.plan_state = self.first.setdefault(shape, batch.plan_state)


@breaks("first_layer")
class LayersInAList(Mutant):
    """The caches of the layers are a list, and a layer's id is taken for its place in it."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        ids = self.kv_cache.layer_ids
        return self.honest(q, replace(layer, layer_id=ids[layer.layer_id % len(ids)]), batch)


@breaks("first_layer")
class LayersInAShortList(Mutant):
    """The same, and an id beyond its end is an error."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        return self.honest(q, replace(layer, layer_id=self.kv_cache.layer_ids[layer.layer_id]), batch)


@breaks("cuda_graph", features=["cuda_graph"])
class StalePageTable(Mutant):
    """A replay does not refresh the page table that the graph reads."""

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        TorchNativeBackend.init_forward_metadata_capture_cuda_graph(self, batch)
        self.table: Tensor | None = None

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self.table = batch.page_table.clone() if self.table is None else self.table
        stale = replace(batch, page_table=self.table)
        TorchNativeBackend.init_forward_metadata_replay_cuda_graph(self, stale)

    def _mutated(self, *args: Any, **options: Any) -> Result:
        return honest_forward(self, *args, **options)


@breaks("cuda_graph", features=["cuda_graph"])
class StaleLengths(StalePageTable):
    """A replay does not refresh the sequence lengths."""

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self.table = batch.seq_lens.clone() if self.table is None else self.table
        stale = replace(batch, seq_lens=self.table)
        TorchNativeBackend.init_forward_metadata_replay_cuda_graph(self, stale)


@breaks("cuda_graph", features=["cuda_graph"])
class NewBuffersEachReplay(StalePageTable):
    """A replay puts its metadata into new tensors, which the graph never sees."""

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        TorchNativeBackend.init_forward_metadata(self, batch)


def honest_forward(
    backend: Mutant, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **o: Any
) -> Result:
    """torch_native's own forward on its own metadata: for faults that lie elsewhere."""
    if isinstance(batch.plan_state, ForwardBatch):
        return Mutant._mutated(backend, q, k, v, layer, batch, **o)
    backend._inside = True
    try:
        return backend.forward_extend(q, k, v, layer, batch, **o)
    finally:
        backend._inside = False


@breaks("deterministic", features=["deterministic"])
class OtherBitsEachTime(Mutant):
    """The last bit of the output depends on the moment, as with atomic additions."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, lse = self.honest(q, layer, batch)
        flip = torch.rand(out.shape, device=out.device) < 0.5
        return torch.where(flip, torch.nextafter(out, torch.full_like(out, float("inf"))), out), lse


@breaks("batch_invariant", features=["batch_invariant"])
class BitsOfTheBatch(Mutant):
    """The last bit of the output depends on how many requests there are."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, lse = self.honest(q, layer, batch)
        return torch.nextafter(out, torch.full_like(out, float("inf"))) if batch.batch_size > 1 else out, lse


@breaks("batch_invariant", "ragged", features=["batch_invariant"])
class RaggedBitsOfTheBatch(Mutant):
    """The same where keys are given: the last bit depends on how many requests there are."""

    def forward_ragged(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, **options: Any) -> Result:
        out, lse = super().forward_ragged(q, k, v, layer, **{**options, "return_lse": True, "out": None})
        if options["query_start_loc"].shape[0] > 2:
            out = torch.nextafter(out, torch.full_like(out, float("inf")))
        return self.give(out, lse, options["return_lse"], options["out"])


@breaks("witness")
class SilentFallback(Mutant):
    """Decodes are handed to another backend, and nobody is told."""

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self.other = TorchNativeBackend(config, kv_cache)

    def forward_decode(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **o: Any) -> Result:
        if self._inside:
            return super().forward_decode(q, k, v, layer, batch, **o)
        return self.other.forward_decode(q, k, v, layer, replace(batch, plan_state=batch.plan_state.plan_state), **o)


@breaks("several_requests")
class FirstRequestForAll(Mutant):
    """Every request reads the pages of the first one."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        return replace(batch, page_table=batch.page_table[:1].expand_as(batch.page_table).contiguous())
