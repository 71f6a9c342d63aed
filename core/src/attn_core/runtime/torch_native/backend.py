"""TorchNativeBackend: every feature of the contract in plain torch, the default that is always there."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_core.errors import BatchError, CapacityError, ConfigError
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.maths import add_sink
from attn_core.runtime.torch_native.padded import attend_padded
from attn_core.runtime.torch_native.pages import read_tokens
from attn_core.runtime.torch_native.plan_state import HostLengths, PaddedStep, check_tree
from attn_core.runtime.torch_native.requests import Sight, attend_request

Result = Tensor | tuple[Tensor, Tensor]


class TorchNativeBackend(AttentionBackend):
    """Attention in plain torch operations, on any device that has them."""

    name: ClassVar[str] = "torch_native"
    cuda_graph_seq_len_fill_value: ClassVar[int] = 0

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        check_tree(batch)
        if batch.mode is ForwardMode.IDLE:
            batch.plan_state = None
        elif batch.mode is ForwardMode.DECODE:
            batch.plan_state = self._padded(batch, query_len=1)
        else:
            batch.plan_state = HostLengths.of(batch)

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
        self._store(q, k, v, layer, batch, save_kv_cache)
        result = attend_padded(q, layer, self.kv_cache, batch.plan_state)
        return _finish(result, q, layer, return_lse, out)

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
        self._store(q, k, v, layer, batch, save_kv_cache)
        if isinstance(batch.plan_state, PaddedStep):
            result = attend_padded(q, layer, self.kv_cache, batch.plan_state)
        else:
            result = self._extend(q, layer, batch, batch.plan_state)
        return _finish(result, q, layer, return_lse, out)

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
        queries, keys = query_start_loc.tolist(), key_start_loc.tolist()
        sight = Sight(causal=causal, window=layer.sliding_window)
        result = _empty_result(q, layer)
        for b in range(len(queries) - 1):
            rows, columns = slice(queries[b], queries[b + 1]), slice(keys[b], keys[b + 1])
            if queries[b + 1] > queries[b]:
                part = attend_request(q[rows], k[columns], v[columns], layer, sight)
                result[0][rows], result[1][rows] = part
        return _finish(result, q, layer, return_lse, out)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._max_batch_size, self._max_num_tokens = max_batch_size, max_num_tokens
        self._graphs: dict[tuple[ForwardMode, int], PaddedStep] = {}

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        if batch.batch_size > self._max_batch_size or batch.num_tokens > self._max_num_tokens:
            raise CapacityError(
                f"{batch.batch_size} requests and {batch.num_tokens} tokens to capture",
                accepted=f"at most {self._max_batch_size} and {self._max_num_tokens}, of init_cuda_graph_state",
            )
        check_tree(batch)
        query_len = batch.num_tokens // max(1, batch.batch_size)
        if query_len * batch.batch_size != batch.num_tokens:
            raise BatchError(
                f"{batch.num_tokens} tokens for {batch.batch_size} requests", accepted="as many for each of them"
            )
        step = _copied(self._padded(batch, query_len))
        self._graphs[batch.mode, batch.batch_size] = step
        batch.plan_state = step

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        step = self._graphs[batch.mode, batch.batch_size]
        _refresh(step, batch)
        batch.plan_state = step

    def _padded(self, batch: ForwardBatch, query_len: int) -> PaddedStep:
        """The step over the batch's own tensors; columns of the page table past max_seq_len are left out."""
        encoder = batch.encoder_page_table
        return PaddedStep(
            query_len=query_len,
            seq_lens=batch.seq_lens,
            page_table=batch.page_table[:, : self._columns(batch.max_seq_len)],
            slot_mapping=batch.slot_mapping,
            tree=None if batch.tree is None else batch.tree.visible,
            encoder_seq_lens=batch.encoder_seq_lens,
            encoder_page_table=None if encoder is None else encoder[:, : self._columns(batch.max_encoder_seq_len)],
        )

    def _columns(self, tokens: int) -> int:
        return max(1, -(-tokens // self.kv_cache.page_size))

    def _store(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, save: bool
    ) -> None:
        """Write k, v to the cache where the step asks for it. Raises BatchError for what cannot be meant."""
        if q.shape[0] != batch.num_tokens:
            raise BatchError(f"q has {q.shape[0]} rows for {batch.num_tokens} tokens", accepted="one row a token")
        if not save:
            return
        slots: Tensor | None = batch.slot_mapping
        if isinstance(batch.plan_state, PaddedStep):
            slots = batch.plan_state.slot_mapping
        if layer.cross:
            if k is None:
                return
            slots = batch.encoder_slot_mapping
        if k is None or slots is None:
            raise BatchError(
                f"layer {layer.layer_id}: {'no keys to store' if k is None else 'keys, and no slots for them'}",
                accepted="k and v with their slots (a cross layer's: encoder_slot_mapping), or save_kv_cache=False",
            )
        self.write_kv(k, v, layer, slots)

    def _extend(
        self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch, lengths: HostLengths
    ) -> tuple[Tensor, Tensor]:
        result = _empty_result(q, layer)
        starts = lengths.query_start
        table, seq_lens = batch.page_table, lengths.seq_lens
        if layer.cross:
            if batch.encoder_page_table is None or lengths.encoder_seq_lens is None:
                raise BatchError(
                    f"layer {layer.layer_id} is a cross layer, and the batch has no encoder",
                    accepted="encoder_seq_lens and encoder_page_table",
                )
            table, seq_lens = batch.encoder_page_table, lengths.encoder_seq_lens
        for b in range(len(starts) - 1):
            rows = slice(starts[b], starts[b + 1])
            if starts[b + 1] > starts[b]:
                k, v = read_tokens(self.kv_cache, layer, table[b], 0, seq_lens[b])
                result[0][rows], result[1][rows] = attend_request(q[rows], k, v, layer, _sight(layer, batch, b))
        return result


def _sight(layer: AttentionLayer, batch: ForwardBatch, b: int) -> Sight:
    if layer.cross:
        return Sight(causal=False)
    tree = None if batch.tree is None else batch.tree.visible[b]
    return Sight(window=layer.sliding_window, tree=tree, spans=None if batch.spans is None else batch.spans[b])


def _empty_result(q: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(q.shape[0], layer.num_q_heads, layer.v_head_dim, dtype=torch.float32)
    return out, q.new_full((q.shape[0], layer.num_q_heads), float("-inf"), dtype=torch.float32)


def _finish(
    result: tuple[Tensor, Tensor], q: Tensor, layer: AttentionLayer, return_lse: bool, out: Tensor | None
) -> Result:
    """The sink, the dtype of q, and ``out`` filled if given."""
    values, lse = result if layer.sinks is None else add_sink(*result, layer.sinks)
    if out is None:
        out = values.to(q.dtype)
    else:
        out.view(values.shape).copy_(values)
    return (out, lse) if return_lse else out


def _copied(step: PaddedStep) -> PaddedStep:
    fields: dict[str, Any] = {
        name: value.clone() if isinstance(value := getattr(step, name), Tensor) else value
        for name in PaddedStep.__slots__
    }
    return PaddedStep(**fields)


def _refresh(step: PaddedStep, batch: ForwardBatch) -> None:
    """Copy a batch into the buffers of a captured step, on the device."""
    columns = step.page_table.shape[1]
    if batch.page_table.shape[1] < columns:
        raise ConfigError(f"a page table of {batch.page_table.shape[1]} columns", accepted=f"{columns}, as captured")
    step.seq_lens.copy_(batch.seq_lens)
    step.page_table.copy_(batch.page_table[:, :columns])
    step.slot_mapping.copy_(batch.slot_mapping)
    if step.tree is not None and batch.tree is not None:
        step.tree.copy_(batch.tree.visible)
    if step.encoder_seq_lens is not None and batch.encoder_seq_lens is not None:
        step.encoder_seq_lens.copy_(batch.encoder_seq_lens)
