"""The backend `fa3`: FlashAttention 3 over the paged cache, every phase of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_fa3.build_flags import BuildFlags
from attn_fa3.calls import Attended, BoundLayer, Calls
from attn_fa3.graph_buffers import GraphBuffers, fixed_splits
from attn_fa3.join import join
from attn_fa3.library import load
from attn_fa3.step import Keys, Step
from attn_fa3.tree import OwnKeys, own_keys, prefix_window


class FA3Backend(AttentionBackend):
    """FlashAttention 3. Takes the page table natively: decode, extend, mixed batches, chains of drafts are one call.

    A tree of drafts is two calls over disjoint keys and a merge. Absorbed MLA goes through ``qv``, if the build has it.
    """

    name = "fa3"
    cuda_graph_seq_len_fill_value = 0

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._calls = Calls(load(), kv_cache)
        self._num_splits = 1 if config.batch_invariant else 0
        self._graphs: GraphBuffers | None = None

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        try:
            flags = BuildFlags.installed()
        except (ImportError, AttributeError, KeyError) as error:
            unknown = f"no flash_attn_config that says so ({error})"
            return (reason("build_unsupported", "flash_attn_config", "a build that says what is in it", unknown),)
        return tuple(flags.refusals(config, phase))

    def warmup(self, config: AttentionConfig) -> None:
        """The kernels of the library are compiled; ours, for trees and sinks, are compiled here."""
        if self.kv_cache.device.type != "cuda":
            return
        for kind in config.layers:
            part = torch.zeros(1, kind.num_q_heads, kind.v_head_dim, dtype=_dtype(config), device=self.kv_cache.device)
            lse = part.new_zeros(1, kind.num_q_heads, dtype=torch.float32)
            sinks = part.new_zeros(kind.num_q_heads) if kind.sinks else None
            if sinks is not None:
                join((part, lse), None, sinks, return_lse=config.lse)
            if "verify" in config.phases and config.speculative_eagle_topk > 1:
                join((part, lse), (part, lse), sinks, return_lse=config.lse)

    # -- the step ------------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = Step.of(batch, self.kv_cache.page_size, num_splits=self._num_splits)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._graphs = GraphBuffers(self.config, self.kv_cache, max_batch_size)
        self.warmup(self.config)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        captured = self._graph_buffers().capture(batch)
        splits = fixed_splits(self.config, batch.num_tokens)
        batch.plan_state = Step.of(captured, self.kv_cache.page_size, num_splits=splits, in_graph=True)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        """Three copies into the shared buffers; the schedules are made inside the graph."""
        self._graph_buffers().refill(batch)

    def _graph_buffers(self) -> GraphBuffers:
        if self._graphs is None:
            raise BatchError("no graph state", hint="call init_cuda_graph_state first")
        return self._graphs

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
            return _nothing(q, layer, return_lse)
        step = cast(Step, batch.plan_state)
        bound = self._calls.bind(layer)
        if step.tree is not None and not layer.cross:
            return self._verify_tree(q, bound, step, step.tree.visible, return_lse, out)
        keys = step.encoder_keys if layer.cross else step.keys
        if keys is None:
            raise BatchError("a cross layer in a batch without encoder_seq_lens and encoder_page_table")
        found = self._calls.attend(q, bound, step, keys, bound.shape, out=out)
        return _finish(found, layer.sinks, return_lse, out)

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
        if not q.shape[0]:
            return _nothing(q, layer, return_lse)
        given: dict[str, Any] = {
            "cu_seqlens_q": query_start_loc,
            "cu_seqlens_k": key_start_loc,
            "max_seqlen_q": max_query_len,
            "max_seqlen_k": max_key_len,
        }
        found = self._calls.attend_ragged(q, k, v, layer, causal=causal, out=out, **given)
        return _finish(found, layer.sinks, return_lse, out)

    def _verify_tree(
        self, q: Tensor, bound: BoundLayer, step: Step, visible: Tensor, return_lse: bool, out: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All drafts over the prefix, each over the keys only it sees, joined."""
        layer, drafts = bound.layer, visible.shape[1]
        window, page_stride = layer.sliding_window, bound.pools.page_stride

        def make() -> tuple[Keys, OwnKeys]:
            prefix = (step.keys.lens - drafts).clamp_(min=0)
            own = own_keys(
                visible,
                prefix,
                step.keys.page_table,
                page_size=self.kv_cache.page_size,
                page_stride=page_stride,
                window=window,
            )
            return Keys(prefix, step.keys.page_table, step.keys.max_len, "prefix"), own

        prefix, own = cast("tuple[Keys, OwnKeys]", step.trees.get((window, page_stride), layer.layer_id, make))
        found = self._calls.attend_own(q, bound, step, own)
        parts = [(found.rows(), found.lse_rows())]
        left_right = prefix_window(window, drafts)
        if left_right is not None:
            shape = bound.shape._replace(window=left_right, causal=False)
            found = self._calls.attend(q, bound, step, prefix, shape)
            parts.insert(0, (found.rows(), found.lse_rows()))
        joined, lse = join(parts[0], parts[1] if parts[1:] else None, layer.sinks, out=out, return_lse=return_lse)
        return (joined, cast(Tensor, lse)) if return_lse else joined


def _finish(
    found: Attended, sinks: Tensor | None, return_lse: bool, out: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """What the library returned, as rows, with ``sinks`` folded in.

    Builds that take sinks take them in bfloat16 alone, and give a log-sum-exp that does not count them.
    """
    rows = found.rows() if out is None else out
    if sinks is not None:
        rows, lse = join((rows, found.lse_rows()), None, sinks, out=rows, return_lse=return_lse)
        return (rows, cast(Tensor, lse)) if return_lse else rows
    return (rows, found.lse_rows()) if return_lse else rows


def _nothing(q: Tensor, layer: AttentionLayer, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    out = q.new_empty(0, layer.num_q_heads, layer.v_head_dim)
    return (out, q.new_empty(0, layer.num_q_heads, dtype=torch.float32)) if return_lse else out


def _dtype(config: AttentionConfig) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, config.dtype))
