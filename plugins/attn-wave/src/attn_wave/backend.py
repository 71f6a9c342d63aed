"""WaveBackend: the protocol, over two kernels of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_wave.attending import Kernels, Keys, attend
from attn_wave.graphs import GraphBuffers
from attn_wave.limits import check_layer, needed_variants, refusals
from attn_wave.runtime import chip_of
from attn_wave.shipped import code_of
from attn_wave.step import Step, given_part, parts_of, step_of
from attn_wave.tables import check_pool, in_units, unit_strides

Result = Tensor | tuple[Tensor, Tensor]


class WaveBackend(AttentionBackend):
    """Attention on AMD Instinct. Every step needs its lengths on the host; its page table is expanded on the device."""

    name: ClassVar[str] = "wave"

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        """Raises ConfigError for a cache whose rows do not begin at multiples of 16 bytes."""
        super().__init__(config, kv_cache)
        for layer_id in kv_cache.layer_ids:
            check_pool(layer_id, "k", kv_cache.k_nhd(layer_id))
            if kv_cache.v(layer_id) is not None:
                check_pool(layer_id, "v", kv_cache.v_nhd(layer_id))
        self.kernels = Kernels(kv_cache.device)
        self._checked: set[tuple[int, bool]] = set()
        self._graphs: GraphBuffers | None = None

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        """What neither the shipped kernels nor the installed compiler can give."""
        return tuple(refusals(config, phase))

    def warmup(self, config: AttentionConfig) -> None:
        """Every kernel that ``config`` can need, from what is shipped or compiled into the cache."""
        arch = chip_of(self.kv_cache.device)
        for variant in needed_variants(config):
            code_of(variant, arch)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = None if batch.mode is ForwardMode.IDLE else step_of(batch, self.kv_cache.page_size)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        """The buffers, and every kernel loaded: none may be while a graph is captured."""
        cache, context = self.kv_cache, self.config.max_context_len
        columns = cache.num_pages - 1 if context is None else -(-context // cache.page_size)
        self._graphs = GraphBuffers(max_batch_size, max_num_tokens, max(1, columns), cache.device)
        for variant in needed_variants(self.config):
            self.kernels.get(variant)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._buffers().capture(batch, self.kv_cache.page_size)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._buffers().replay(batch)

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
        self._check(layer, q, batch.num_tokens, cached=True)
        if save_kv_cache:
            self._save(k, v, layer, step.batch)
        parts = step.once(("parts", layer.cross, layer.sliding_window), lambda: parts_of(step, layer))
        keys = self._paged_keys(step, layer)
        found = attend(self.kernels, _readable(q), keys, layer, parts, step.once, out)
        return found if return_lse else found[0]

    #: A decode is a step whose requests have one query each; the work list is all that differs.
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
    ) -> Result:
        """Reads the starts on the host: one wait for the device a call."""
        self._check(layer, q, q.shape[0], cached=False)
        if layer.sliding_window is not None and not causal:
            raise ConfigError("a window over keys that are not causal", accepted="causal=True with a window")
        part = given_part(query_start_loc.cpu(), key_start_loc.cpu(), causal, layer.sliding_window, q.device)
        k, v = _readable(k), _readable(v)
        tokens = torch.arange(k.shape[0], device=k.device)
        rows = [(tokens * unit_strides(t)[0]).to(torch.int32) for t in (k, v)]
        found = attend(
            self.kernels,
            _readable(q),
            Keys(k, v, rows[0], rows[1], unit_strides(k)[1], unit_strides(v)[1]),
            layer,
            [part],
            _each_time,
            out,
        )
        return found if return_lse else found[0]

    def _buffers(self) -> GraphBuffers:
        if self._graphs is None:
            raise BatchError("a graph without its buffers", accepted="init_cuda_graph_state before any capture")
        return self._graphs

    def _save(self, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch) -> None:
        slots = batch.encoder_slot_mapping if layer.cross else batch.slot_mapping
        if k is not None and slots is not None:
            self.kv_cache.write(layer, slots, k, v)
        elif not layer.cross:
            raise BatchError(f"layer {layer.layer_id}: no keys to store", accepted="k and v, or save_kv_cache=False")

    def _paged_keys(self, step: Step, layer: AttentionLayer) -> Keys:
        """The layer's pools, and where the keys of the step lie in them; layers of like strides share the tables."""
        key, value = self.kv_cache.k_nhd(layer.layer_id), self.kv_cache.v_nhd(layer.layer_id, layer.v_head_dim)
        places = step.places(layer.cross)
        rows = [
            step.once(("rows", layer.cross, unit_strides(pool)[:2]), partial(places.rows, pool))
            for pool in (key, value)
        ]
        return Keys(key, value, rows[0], rows[1], unit_strides(key)[2], unit_strides(value)[2])

    def _check(self, layer: AttentionLayer, q: Tensor, tokens: int, *, cached: bool) -> None:
        if q.shape[0] != tokens:
            raise BatchError(f"q has {q.shape[0]} rows for {tokens} tokens", accepted="one row a token")
        if (layer.layer_id, cached) not in self._checked:
            check_layer(layer, q.dtype, self.kv_cache.dtype if cached else q.dtype)
            self._checked.add((layer.layer_id, cached))


def _each_time(key: object, make: Callable[[], object]) -> object:
    return make()


def _readable(tensor: Tensor) -> Tensor:
    """As it is where its rows can be addressed, else a copy."""
    return tensor if in_units(tensor) else tensor.contiguous().clone()
