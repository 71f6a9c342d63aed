"""Captured graphs: fixed buffers that all graphs share, and one wrapper for each shape of layer and batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from attn_core.errors import BatchError, CapacityError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_flashinfer.choice import LayerShape, Route, route
from attn_flashinfer.library import Library, errors_of
from attn_flashinfer.masks import SLACK, MaskPlan, pack
from attn_flashinfer.page_indices import expand, longest_row, on_host, page_counts
from attn_flashinfer.step import plan_options
from attn_flashinfer.wrappers import Staging, workspace

#: What a wrapper makes for itself: the tables of its plan on the device. All batch sizes of a shape share one.
PLAN_BYTES: Final = 8 << 20


@dataclass(slots=True, eq=False)
class GraphStep:
    """What a captured batch carries: its wrappers by layer shape."""

    wrappers: dict[LayerShape, Any]


@dataclass(slots=True, eq=False)
class _Captured:
    """One graph's plan for one shape of layer."""

    shape: LayerShape
    way: Route
    wrapper: Any
    packed: Tensor | None
    query_starts: Tensor
    options: dict[str, Any]


class KeyBuffers:
    """The pages of a step where captured graphs read them: indptr [max_batch + 1], last_page_len [max_batch] and
    indices [max_batch * max_pages], int32. A refill is one copy of the lengths and one kernel for the indices.
    """

    def __init__(self, max_batch_size: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._size = max_batch_size
        self._staging = Staging(2 * max_batch_size + 1, torch.int32, device)
        self._lengths = torch.zeros(2 * max_batch_size + 1, dtype=torch.int32, device=device)
        self.indices = torch.zeros(max_batch_size * max_pages, dtype=torch.int32, device=device)
        self.host_indptr = torch.zeros(1, dtype=torch.int32)
        self.host_last_page_len = torch.zeros(0, dtype=torch.int32)
        self.host_lens = torch.zeros(0, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._lengths.nbytes + self.indices.nbytes

    def indptr(self, batch_size: int) -> Tensor:
        """[B + 1] on the device."""
        return self._lengths[: batch_size + 1]

    def last_page_len(self, batch_size: int) -> Tensor:
        """[B] on the device."""
        return self._lengths[self._size + 1 : self._size + 1 + batch_size]

    def refill(self, lens: Tensor | None, page_table: Tensor) -> None:
        """From host lengths [B] and the page table [B, pages]; no device-to-host copy, no allocation on the device."""
        self.host_lens = on_host(lens, "seq_lens_cpu")
        self.host_indptr, self.host_last_page_len = page_counts(self.host_lens, self._page_size)
        batch = len(self.host_lens)
        if int(self.host_indptr[-1]) > self.indices.numel():
            raise BatchError(
                f"{int(self.host_indptr[-1])} pages in graphs for {self.indices.numel()}",
                accepted="max_batch_size requests of max_context_len tokens",
                hint="plan with a larger max_context_len",
            )
        staging = self._staging.take()
        lengths = staging.numpy()
        lengths[: batch + 1] = self.host_indptr.numpy()
        lengths[self._size + 1 : self._size + 1 + batch] = self.host_last_page_len.numpy()
        self._lengths.copy_(staging, non_blocking=True)
        self._staging.mark_copied()
        expand(page_table, self.indptr(batch), self.indices, longest=longest_row(self.host_indptr))


class GraphPlanner:
    """Plans captured batches, and plans them again before a replay."""

    def __init__(self, config: AttentionConfig, cache: KVCache, library: Library, max_batch_size: int) -> None:
        self._config = config
        self._cache = cache
        self._library = library
        self._max_batch_size = max_batch_size
        max_len = cache.num_pages * cache.page_size if config.max_context_len is None else config.max_context_len
        self._max_pages = -(-max_len // cache.page_size)
        self.keys = KeyBuffers(max_batch_size, self._max_pages, cache.page_size, cache.device)
        self.encoder_keys: KeyBuffers | None = None
        self._captured: dict[tuple[ForwardMode, int, int, bool], list[_Captured]] = {}
        self._plan_tables: dict[tuple[LayerShape, Route, int], Tensor] = {}
        self._staging = Staging(PLAN_BYTES, torch.uint8, cache.device)
        self._queries: dict[int, Tensor] = {}
        self._depths: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device of everything that graphs hold, without the shared workspace."""
        masks = [c.packed.nbytes for many in self._captured.values() for c in many if c.packed is not None]
        encoder = 0 if self.encoder_keys is None else self.encoder_keys.nbytes
        tables = [t.nbytes for t in self._plan_tables.values()]
        trees = [t.nbytes for t in self._depths.values()]
        return self.keys.nbytes + encoder + sum(masks) + sum(tables) + sum(trees)

    def capture(self, batch: ForwardBatch, shapes: list[LayerShape]) -> GraphStep:
        """Wrappers over the shared buffers for every shape of layer, planned for ``batch``."""
        b = batch.batch_size
        if b > self._max_batch_size:
            raise CapacityError(f"a graph of {b} requests", accepted=f"up to {self._max_batch_size}, as announced")
        if batch.encoder_seq_lens is not None and self.encoder_keys is None:
            device = self._cache.device
            self.encoder_keys = KeyBuffers(self._max_batch_size, self._max_pages, self._cache.page_size, device)
        key = _key(batch)
        if key not in self._captured:
            ways = [(shape, route(shape, batch, self._config, self._cache.device)) for shape in shapes]
            self._captured[key] = [self._new(batch, shape, way) for shape, way in ways]
        self._plan(batch, first=True)
        return GraphStep({c.shape: c.wrapper for c in self._captured[key]})

    def replay(self, batch: ForwardBatch) -> None:
        """Plan again for ``batch``. Raises BatchError for a batch size that was not captured."""
        if _key(batch) not in self._captured:
            sizes = sorted({b for mode, b, _, _ in self._captured if mode is batch.mode})
            raise BatchError(f"{batch.mode.name} of {batch.batch_size} requests was not captured", accepted=sizes)
        self._plan(batch, first=False)

    def _new(self, batch: ForwardBatch, shape: LayerShape, way: Route) -> _Captured:
        b, q = batch.batch_size, batch.num_tokens // max(1, batch.batch_size)
        keys = self._keys(shape)
        device = self._cache.device
        packed = None
        if way.masked:
            longest = self._max_pages * self._cache.page_size
            packed = torch.zeros(b * -(-q * longest // 8) + SLACK, dtype=torch.uint8, device=device)
        options: dict[str, Any] = {"kv_layout": self._cache.layout, "use_cuda_graph": True, "backend": way.kernels}
        with errors_of("a new wrapper for a graph"):
            if way.decode:
                wrapper = self._library.decode_wrapper(
                    workspace(device),
                    use_tensor_cores=True,
                    paged_kv_indptr_buffer=keys.indptr(b),
                    paged_kv_indices_buffer=keys.indices,
                    paged_kv_last_page_len_buffer=keys.last_page_len(b),
                    **options,
                )
            else:
                wrapper = self._library.prefill_wrapper(
                    workspace(device),
                    qo_indptr_buf=self._query_starts(q)[: b + 1],
                    paged_kv_indptr_buf=keys.indptr(b),
                    paged_kv_indices_buf=keys.indices,
                    paged_kv_last_page_len_buf=keys.last_page_len(b),
                    custom_mask_buf=packed,
                    mask_indptr_buf=None if packed is None else torch.zeros(b + 1, dtype=torch.int32, device=device),
                    **options,
                )
            tables = self._plan_tables.get((shape, way, q))
            if tables is None:
                tables = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
                self._plan_tables[shape, way, q] = tables
            wrapper.reset_workspace_buffer(workspace(device), tables)
        if way.masked and q not in self._depths:
            self._depths[q] = torch.empty(self._max_batch_size * q, dtype=torch.int32, device=device)
        starts = torch.arange(0, (b + 1) * q, q, dtype=torch.int32)
        return _Captured(shape, way, wrapper, packed, starts, plan_options(shape, way, self._config, self._cache))

    def _plan(self, batch: ForwardBatch, *, first: bool) -> None:
        self.keys.refill(batch.seq_lens_cpu, batch.page_table)
        if self.encoder_keys is not None and batch.encoder_page_table is not None:
            self.encoder_keys.refill(batch.encoder_seq_lens_cpu, batch.encoder_page_table)
        for captured in self._captured[_key(batch)]:
            with errors_of("planning a graph"), self._staged(captured.wrapper):
                if captured.way.decode:
                    self._plan_decode(captured, first)
                else:
                    self._plan_prefill(captured, batch)

    @contextmanager
    def _staged(self, wrapper: Any) -> Iterator[None]:
        """Plans of ``wrapper`` are computed in a piece of page-locked memory that no copy still reads."""
        own = wrapper._pin_memory_int_workspace_buffer
        wrapper._pin_memory_int_workspace_buffer = self._staging.take()
        try:
            yield
        finally:
            wrapper._pin_memory_int_workspace_buffer = own
            self._staging.mark_copied()

    def _plan_decode(self, captured: _Captured, first: bool) -> None:
        keys, wrapper = self._keys(captured.shape), captured.wrapper
        indptr, last_page_len = keys.host_indptr, keys.host_last_page_len
        if first:
            wrapper.plan(indptr, keys.indices[:0], last_page_len, **captured.options)
            return
        self._library.fast_decode_plan(
            wrapper, indptr, keys.indices, last_page_len, global_override_indptr_cpu=indptr, **captured.options
        )

    def _plan_prefill(self, captured: _Captured, batch: ForwardBatch) -> None:
        keys = self._keys(captured.shape)
        q = batch.num_tokens // max(1, batch.batch_size)
        captured.wrapper.plan(
            captured.query_starts,
            keys.host_indptr,
            keys.indices[:0],
            keys.host_last_page_len,
            causal=captured.way.causal,
            uniform_q_len=q,
            **captured.options,
        )
        if captured.packed is not None:
            self._refill_mask(captured, batch, q)

    def _refill_mask(self, captured: _Captured, batch: ForwardBatch, q: int) -> None:
        assert captured.packed is not None
        lens = self.keys.host_lens.numpy()
        plan = MaskPlan.of(np.full(len(lens), q), lens)
        starts = captured.wrapper._mask_indptr_buf
        starts.copy_(plan.byte_starts, non_blocking=True)
        pack(batch, captured.shape.window, starts, captured.packed, longest=plan.longest, depths=self._depths[q])

    def _keys(self, shape: LayerShape) -> KeyBuffers:
        if not shape.cross:
            return self.keys
        if self.encoder_keys is None:
            raise BatchError("a cross layer in a batch without encoder_seq_lens and encoder_page_table")
        return self.encoder_keys

    def _query_starts(self, q: int) -> Tensor:
        if q not in self._queries:
            count = (self._max_batch_size + 1) * q
            self._queries[q] = torch.arange(0, count, q, dtype=torch.int32, device=self._cache.device)
        return self._queries[q]


def _key(batch: ForwardBatch) -> tuple[ForwardMode, int, int, bool]:
    return batch.mode, batch.batch_size, batch.num_tokens, batch.tree is not None
