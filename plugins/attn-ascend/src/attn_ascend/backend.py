"""AscendBackend: the protocol, over torch-npu's fused attention operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from attn_core.errors import BatchError, CapacityError, ConfigError, PluginLoadError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_ascend import operators as vendor
from attn_ascend.attend import FusedAttention, Output, Wanted, attend, takes_tokens
from attn_ascend.copies import in_place, readable, warn_of_copies
from attn_ascend.graphs import GraphTasks
from attn_ascend.keys import GivenKeys, PagedKeys
from attn_ascend.latent import attend_latent
from attn_ascend.limits import check_cache, check_layer, refusals, refuse_soc
from attn_ascend.paged import attend_paged
from attn_ascend.ragged import blind_rows, lengths_of
from attn_ascend.sight import compressed_mask
from attn_ascend.sinks import add_sink
from attn_ascend.step import Lengths, Step, host_lengths, step_of
from attn_ascend.writing import write

Result = Tensor | tuple[Tensor, Tensor]


class AscendBackend(AttentionBackend):
    """Attention on Huawei NPUs. Every step needs its lengths on the host; the device is never waited for."""

    name: ClassVar[str] = "ascend"
    #: a padded request reads one key of the null page
    cuda_graph_seq_len_fill_value: ClassVar[int] = 1

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        """Raises PluginLoadError without torch-npu or a card, ConfigError for a cache that cannot be read in place."""
        super().__init__(config, kv_cache)
        self.operators = vendor.load(kv_cache.device.type)
        check_cache(kv_cache)
        warn_of_copies(kv_cache)
        self.graphs = GraphTasks(self.operators, torch.npu if kv_cache.device.type == "npu" else None)  # type: ignore[attr-defined]
        self._checked: set[tuple[int, bool]] = set()
        self._graph_steps: dict[tuple[str, int, int], Step] = {}
        self._table: Tensor | None = None
        self._slots: Tensor | None = None

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        """What the installed torch-npu, its operators or the chip cannot do."""
        try:
            operators = vendor.load("npu")
        except PluginLoadError as error:
            return (reason("build_unsupported", "torch-npu", "its operators", error.message, error.hint),)
        soc = () if vendor.emulated else refuse_soc(vendor.soc_version())
        return (*soc, *refusals(operators, config, phase))

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = None if batch.mode is ForwardMode.IDLE else step_of(batch)

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
        self._check(layer, q, batch.num_tokens, return_lse)
        if save_kv_cache:
            write(self.operators, self.kv_cache, layer, k, v, step.slots)
        q = q.contiguous()
        size, values = self.kv_cache.page_size, self.kv_cache.v(layer.layer_id)
        if values is None:
            step, (latent,) = readable(step, size, self.kv_cache.k(layer.layer_id))
            return _finish((attend_latent(self.operators, self._eager, q, latent, layer, step), None), False, out)
        step, (key, value) = readable(step, size, self.kv_cache.k(layer.layer_id), values)
        if not self.operators.fused:
            return _finish((attend_paged(self.operators, q, key, value, layer, step), None), False, out)
        fused = self._eager
        if step.graph is not None and self.graphs.capturing():
            fused = _Captured(self.graphs, step.graph)
        keys = PagedKeys(key.flatten(2), value.flatten(2), step.table, size)
        return self._attend(fused, q, keys, layer, step.lengths, return_lse=return_lse, out=out)

    #: A decode is a step whose requests have one query each; the layouts find that out by themselves.
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
        self._check(layer, q, q.shape[0], return_lse, paged=False)
        if layer.sliding_window is not None and not causal:
            raise ConfigError("a window over keys that are not causal", accepted="causal=True with a window")
        lengths = lengths_of(query_start_loc, key_start_loc)
        keys = GivenKeys(k.contiguous(), v.contiguous())
        blind = blind_rows(lengths, causal)
        return self._attend(
            self._eager,
            q.contiguous(),
            keys,
            layer,
            lengths,
            causal=causal,
            return_lse=return_lse,
            out=out,
            blind=blind,
        )

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        write(self.operators, self.kv_cache, layer, k, v, slot_mapping.to(torch.int32))

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        if not self.operators.fused or self.kv_cache.layout == "MLA":
            raise ConfigError(
                "NPU graphs of operators that have no graph form", accepted="MHA layers with the fused operator",
                hint="plan with cuda_graph=True: it is refused there",
            )  # fmt: skip
        if not in_place(self.kv_cache):
            raise ConfigError("NPU graphs over a cache of strides", accepted="contiguous keys and values")
        pages = self.kv_cache.num_pages
        if self.config.max_context_len is not None:
            pages = min(pages, -(-self.config.max_context_len // self.kv_cache.page_size))
        device = self.kv_cache.device
        compressed_mask(device)  # made here: what is made in a capture holds nothing until the graph is replayed
        with torch.inference_mode(False):  # replays may come in another mode
            self._table = torch.zeros(max_batch_size, pages, dtype=torch.int32, device=device)
            self._slots = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        if self._table is None or self._slots is None:
            raise ConfigError("a capture before init_cuda_graph_state", accepted="init_cuda_graph_state first")
        if batch.batch_size > self._table.shape[0] or batch.num_tokens > self._slots.shape[0]:
            raise CapacityError(
                f"{batch.batch_size} requests and {batch.num_tokens} tokens to capture",
                accepted=f"at most {self._table.shape[0]} and {self._slots.shape[0]}, of init_cuda_graph_state",
            )
        lengths = host_lengths(batch)
        if len(set(lengths.queries)) > 1:
            raise BatchError(f"query lengths {lengths.queries} to capture", accepted="as many tokens for each request")
        key = _graph_key(batch)
        step = Step(lengths, self._table[: batch.batch_size], self._slots[: batch.num_tokens], key)
        _refresh(step, batch)
        self.graphs.forget(key)
        self._graph_steps[key] = step
        batch.plan_state = step

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        step = self._graph_steps.get(_graph_key(batch))
        if step is None:
            raise BatchError(
                f"a replay of {batch.batch_size} requests and {batch.num_tokens} tokens in mode {batch.mode.name}",
                accepted="what was captured",
            )
        step.lengths.keys[:] = host_lengths(batch, synchronise=False).keys
        _refresh(step, batch)
        self.graphs.renew(_graph_key(batch), step.lengths.keys)
        batch.plan_state = step

    def _attend(
        self,
        fused: FusedAttention,
        q: Tensor,
        keys: PagedKeys | GivenKeys,
        layer: AttentionLayer,
        lengths: Lengths,
        *,
        causal: bool = True,
        return_lse: bool,
        out: Tensor | None,
        blind: Sequence[slice] = (),
    ) -> Result:
        """Attention with the sink in whichever way is exact, and rows that see no key put right."""
        sinks = layer.sinks
        own_sink = None if return_lse or blind else self._own_sink(layer, paged=isinstance(keys, PagedKeys))
        lse_needed = return_lse or (sinks is not None and own_sink is None)
        if q.shape[0] == 0 or not any(lengths.keys):
            values: Tensor = q.new_zeros(*q.shape[:2], layer.v_head_dim)
            lse: Tensor | None = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
        else:
            values, lse = attend(fused, q, keys, layer, lengths, Wanted(lse_needed, own_sink, causal))
            for rows in blind:
                values[rows] = 0
                if lse is not None:
                    lse[rows] = float("-inf")
        if sinks is not None and own_sink is None:
            assert lse is not None
            values, lse = add_sink(values, lse, sinks)
        return _finish((values, lse), return_lse, out)

    def _own_sink(self, layer: AttentionLayer, *, paged: bool) -> Tensor | None:
        """The layer's sinks, if the operator takes them as they are: bf16, layout TND, values of at most 128."""
        exact = (
            layer.sinks is not None
            and self.operators.takes_sinks
            and layer.sinks.dtype == torch.bfloat16 == self.kv_cache.dtype
            and takes_tokens(layer, paged=paged)
            and layer.v_head_dim <= 128
        )
        return layer.sinks if exact else None

    def _check(self, layer: AttentionLayer, q: Tensor, tokens: int, return_lse: bool, *, paged: bool = True) -> None:
        if q.shape[0] != tokens:
            raise BatchError(f"q has {q.shape[0]} rows for {tokens} tokens", accepted="one row a token")
        if (layer.layer_id, paged) not in self._checked:
            check_layer(layer, paged=paged)
            self._checked.add((layer.layer_id, paged))
        if return_lse and paged and (layer.kind == "mla" or not self.operators.fused):
            raise ConfigError(
                f"layer {layer.layer_id}: the operator that runs it returns no LSE", accepted="return_lse=False"
            )

    def _eager(
        self, query: Tensor, key: Tensor, value: Tensor, *, shape: tuple[int, ...], lse: bool, **arguments: object
    ) -> Output:
        out, found = self.operators.fused_attention(query, key, value, return_softmax_lse=lse, **arguments)
        return out, found if lse else None


class _Captured:
    """The fused operator, captured into one graph."""

    def __init__(self, graphs: GraphTasks, key: tuple[str, int, int]) -> None:
        self._graphs, self._key = graphs, key

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, shape: tuple[int, ...], lse: bool, **arguments: object
    ) -> Output:
        return self._graphs.capture(self._key, query, key, value, shape=shape, lse=lse, **arguments)


def _graph_key(batch: ForwardBatch) -> tuple[str, int, int]:
    return batch.mode.name, batch.batch_size, batch.num_tokens


def _refresh(step: Step, batch: ForwardBatch) -> None:
    """Copy a batch's page table and slots into the buffers of a captured step, on the device.

    A sequence that fits the cache needs no column past the buffer's; columns that the batch lacks are not used.
    """
    columns = min(step.table.shape[1], batch.page_table.shape[1])
    step.table[:, :columns].copy_(batch.page_table[:, :columns])
    step.slots.copy_(batch.slot_mapping)


def _finish(result: Output, return_lse: bool, out: Tensor | None) -> Result:
    values, lse = result
    if out is not None:
        out.view(values.shape).copy_(values)
        values = out
    if not return_lse:
        return values
    assert lse is not None
    return values, lse
