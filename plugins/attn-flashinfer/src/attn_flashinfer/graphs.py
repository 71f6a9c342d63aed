"""Captured graphs: fixed buffers that all graphs share, and one wrapper for each shape of layer and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attn_core.errors import BatchError, CapacityError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_flashinfer.choice import LayerShape, Route, route
from attn_flashinfer.key_buffers import KeyBuffers
from attn_flashinfer.library import RAISED, Library, errors_of, raised
from attn_flashinfer.masks import SLACK, MaskPlan, pack
from attn_flashinfer.page_indices import page_counts
from attn_flashinfer.plan_tables import PlanTables, Replanned
from attn_flashinfer.step import plan_options
from attn_flashinfer.wrappers import Staging, workspace


@dataclass(slots=True, eq=False)
class GraphStep:
    """What a captured batch carries: its wrappers by layer shape."""

    wrappers: dict[LayerShape, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """One graph's wrapper for one shape of layer."""

    shape: LayerShape
    way: Route
    planned: Replanned


class _Masks:
    """The packed masks of all graphs: one graph runs at a time, its masks packed just before. By window and number of
    drafts: the mask, and room for the drafts' depths. ``starts`` [max_batch + 1]: where each request's bits begin.
    """

    def __init__(self, max_batch_size: int, max_keys: int, device: torch.device) -> None:
        self._size, self._max_keys, self._device = max_batch_size, max_keys, device
        self._staging = Staging(max_batch_size + 1, torch.int32, device)
        self._made: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}
        self.starts = torch.zeros(max_batch_size + 1, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.starts.nbytes + sum(packed.nbytes + depths.nbytes for packed, depths in self._made.values())

    def packed(self, window: int | None, q: int) -> Tensor:
        """The buffer for this window and ``q`` drafts a request."""
        if (window, q) not in self._made:
            size = self._size * -(-q * self._max_keys // 8) + SLACK
            packed = torch.zeros(size, dtype=torch.uint8, device=self._device)
            depths = torch.empty(self._size * q, dtype=torch.int32, device=self._device)
            self._made[window, q] = packed, depths
        return self._made[window, q][0]

    def refill(self, batch: ForwardBatch, lens: Tensor, windows: set[int | None]) -> None:
        """Pack the masks of ``batch``, whose keys are ``lens`` [B] on the host, for each of the windows."""
        b, q = batch.batch_size, batch.num_tokens // max(1, batch.batch_size)
        plan = MaskPlan.of(np.full(b, q), lens.numpy())
        piece = self._staging.take()
        piece[: b + 1] = plan.byte_starts
        self.starts.copy_(piece, non_blocking=True)
        self._staging.mark_copied()
        for window in windows:
            packed, depths = self._made[window, q]
            pack(batch, window, self.starts[: b + 1], packed, longest=plan.longest, depths=depths)


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
        self._tables = PlanTables(cache.device)
        self._workspaces: dict[tuple[LayerShape, Route, int], Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._masks = _Masks(max_batch_size, self._max_pages * cache.page_size, cache.device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device of everything that graphs hold, without the shared workspace."""
        encoder = 0 if self.encoder_keys is None else self.encoder_keys.nbytes
        return self.keys.nbytes + encoder + self._masks.nbytes + sum(t.nbytes for t in self._workspaces.values())

    def capture(self, batch: ForwardBatch, shapes: list[LayerShape]) -> GraphStep:
        """Wrappers over the shared buffers for every shape of layer, planned for ``batch``."""
        b = batch.batch_size
        if b > self._max_batch_size:
            raise CapacityError(f"a graph of {b} requests", accepted=f"up to {self._max_batch_size}, as announced")
        _check_uniform(batch)
        if batch.encoder_seq_lens is not None and self.encoder_keys is None:
            device = self._cache.device
            self.encoder_keys = KeyBuffers(self._max_batch_size, self._max_pages, self._cache.page_size, device)
        key = _key(batch)
        self._refill(batch)
        if key not in self._captured:
            ways = [(shape, route(shape, batch, self._config, self._cache.device)) for shape in shapes]
            self._captured[key] = [self._new(batch, shape, way) for shape, way in ways]
        self._plan(self._captured[key], batch, first=True)
        return GraphStep({c.shape: c.planned.made for c in self._captured[key]})

    def replay(self, batch: ForwardBatch) -> None:
        """Plan again for ``batch``. Raises BatchError for a batch size that was not captured."""
        captured = self._captured.get(_key(batch))
        if captured is None:
            sizes = sorted({b for mode, b, _, _ in self._captured if mode is batch.mode})
            raise BatchError(f"{batch.mode.name} of {batch.batch_size} requests was not captured", accepted=sizes)
        _check_uniform(batch)
        self._refill(batch)
        self._plan(captured, batch, first=False)

    def _refill(self, batch: ForwardBatch) -> None:
        self.keys.refill(batch.seq_lens_cpu, batch.seq_lens, batch.page_table)
        if self.encoder_keys is not None and batch.encoder_page_table is not None:
            assert batch.encoder_seq_lens is not None, "encoder pages without their lengths"
            self.encoder_keys.refill(batch.encoder_seq_lens_cpu, batch.encoder_seq_lens, batch.encoder_page_table)

    def _plan(self, many: list[_Captured], batch: ForwardBatch, *, first: bool) -> None:
        windows = {captured.shape.window for captured in many if captured.way.masked}
        if windows:
            self._masks.refill(batch, self.keys.host_lens, windows)
        try:
            for captured in many:
                keys = self._keys(captured.shape)
                self._tables.plan(captured.planned, keys.host_indptr, keys.host_lens, first=first)
        except RAISED as error:
            raise raised(error, "planning a graph") from error

    def _new(self, batch: ForwardBatch, shape: LayerShape, way: Route) -> _Captured:
        b, q = batch.batch_size, batch.num_tokens // max(1, batch.batch_size)
        device = self._cache.device
        query_starts = torch.arange(0, (b + 1) * q, q, dtype=torch.int32)
        options = plan_options(shape, way, self._config, self._cache)
        with errors_of("a new wrapper for a graph"):
            wrapper = self._new_wrapper(shape, way, b, q)
            tables = self._workspaces.get((shape, way, q))
            if tables is None:
                tables = self._workspaces[shape, way, q] = self._tables.workspace()
            wrapper.reset_workspace_buffer(workspace(device), tables)
            self._choose_module(wrapper, shape, way, query_starts, options)
        sizes = self._sizes(shape, way, b, q, options["window_left"])
        return _Captured(shape, way, Replanned(wrapper, wrapper._cached_module.plan, query_starts, sizes))

    def _new_wrapper(self, shape: LayerShape, way: Route, b: int, q: int) -> Any:
        keys, device = self._keys(shape), self._cache.device
        options: dict[str, Any] = {"kv_layout": self._cache.layout, "use_cuda_graph": True, "backend": way.kernels}
        if way.decode:
            return self._library.decode_wrapper(
                workspace(device),
                use_tensor_cores=True,
                paged_kv_indptr_buffer=keys.indptr(b),
                paged_kv_indices_buffer=keys.indices,
                paged_kv_last_page_len_buffer=keys.last_page_len(b),
                **options,
            )
        return self._library.prefill_wrapper(
            workspace(device),
            qo_indptr_buf=self._query_starts(q)[: b + 1],
            paged_kv_indptr_buf=keys.indptr(b),
            paged_kv_indices_buf=keys.indices,
            paged_kv_last_page_len_buf=keys.last_page_len(b),
            custom_mask_buf=self._masks.packed(shape.window, q) if way.masked else None,
            mask_indptr_buf=self._masks.starts[: b + 1] if way.masked else None,
            **options,
        )

    def _choose_module(
        self, wrapper: Any, shape: LayerShape, way: Route, query_starts: Tensor, options: dict[str, Any]
    ) -> None:
        """The wrapper's own plan, which finds its compiled module and keeps the options for its runs.

        Nothing runs with this plan. Without splits it needs no room for parts; it is not told that all requests have
        the same number of tokens, which would make it look for kernels of its own for some numbers.
        """
        keys = self._keys(shape)
        indptr, last_page_len = page_counts(keys.host_lens, self._cache.page_size)
        pages = (indptr, keys.indices[:0], last_page_len)
        if way.decode:
            wrapper.plan(*pages, disable_split_kv=True, **options)
        else:
            wrapper.plan(query_starts, *pages, causal=way.causal, disable_split_kv=True, **options)

    def _sizes(self, shape: LayerShape, way: Route, b: int, q: int, window_left: int) -> tuple[Any, ...]:
        """What the planner of the module takes after the lengths, in its order.

        fa2 takes four more: no fixed split, splitting allowed, no thread blocks of others, and that every request has
        ``q`` tokens, so that its tiles fit that and not one request having all.
        """
        sizes = (
            b * q, b, shape.num_q_heads, shape.num_kv_heads, self._cache.page_size, True, shape.qk_head_dim,
            shape.v_head_dim, way.causal, window_left,
        )  # fmt: skip
        return (*sizes, -1, False, 0, q) if way.kernels == "fa2" else sizes

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


def _check_uniform(batch: ForwardBatch) -> None:
    if batch.max_query_len * batch.batch_size != batch.num_tokens:
        raise BatchError(
            f"a graph of {batch.mode.name} with {batch.num_tokens} tokens of {batch.batch_size} requests",
            accepted="the same number of tokens for each request",
        )
