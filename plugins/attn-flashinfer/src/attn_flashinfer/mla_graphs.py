"""Captured graphs of MLA: the fixed buffers that all share, and the plan made again before a replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from attn_core.errors import BatchError, CapacityError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_flashinfer.key_buffers import KeyBuffers
from attn_flashinfer.library import RAISED, errors_of, raised
from attn_flashinfer.mla_plan import LatentShape, MLAStep, plan_latent
from attn_flashinfer.plan_tables import PlanTables, Replanned
from attn_flashinfer.wrappers import workspace


class _Captured(NamedTuple):
    """A wrapper of one shape of layer and captured batch size, and how it is planned again."""

    wrapper: Any
    planned: Replanned


class MLAGraphPlanner:
    """One wrapper for each shape of layer and captured batch size, over one set of page buffers."""

    def __init__(
        self, config: AttentionConfig, cache: KVCache, library: Any, kernels: str, max_batch_size: int
    ) -> None:
        max_len = cache.num_pages * cache.page_size if config.max_context_len is None else config.max_context_len
        pages = -(-max_len // cache.page_size)
        self._config, self._cache, self._library, self._kernels = config, cache, library, kernels
        self._max_batch_size = max_batch_size
        self.keys = KeyBuffers(max_batch_size, pages, cache.page_size, cache.device)
        self._lens = torch.zeros(max_batch_size, dtype=torch.int32, device=cache.device)
        self._queries: dict[int, Tensor] = {}
        self._workspaces: dict[tuple[LatentShape, int], Tensor] = {}
        self._tables = PlanTables(cache.device)
        self._captured: dict[tuple[ForwardMode, int, int], dict[LatentShape, _Captured]] = {}

    def capture(self, batch: ForwardBatch, shapes: list[LatentShape]) -> MLAStep:
        """Wrappers over the shared buffers for every shape of layer, planned for ``batch``."""
        b = batch.batch_size
        if b > self._max_batch_size:
            raise CapacityError(f"a graph of {b} requests", accepted=f"up to {self._max_batch_size}, as announced")
        self.keys.refill(batch.seq_lens_cpu, batch.seq_lens, batch.page_table)
        key = (batch.mode, b, batch.num_tokens)
        if key not in self._captured:
            self._captured[key] = {shape: self._new(batch, shape) for shape in shapes}
        self._plan(self._captured[key], first=True)
        return MLAStep({shape: captured.wrapper for shape, captured in self._captured[key].items()})

    def replay(self, batch: ForwardBatch) -> None:
        """Plan again: the library's plan kernel tables alone, into the buffers that the graph reads.

        ``wrapper.plan`` would copy its 8 MiB of tables aside first, in case it fails. Raises BatchError for a batch
        size that was not captured, KernelError if the library lays the tables out otherwise than for the capture.
        """
        captured = self._captured.get((batch.mode, batch.batch_size, batch.num_tokens))
        if captured is None:
            sizes = sorted({b for mode, b, _ in self._captured if mode is batch.mode})
            raise BatchError(f"{batch.mode.name} of {batch.batch_size} requests was not captured", accepted=sizes)
        self.keys.refill(batch.seq_lens_cpu, batch.seq_lens, batch.page_table)
        self._plan(captured, first=False)

    def _plan(self, many: dict[LatentShape, _Captured], *, first: bool) -> None:
        try:
            for captured in many.values():
                self._tables.plan(captured.planned, self.keys.host_indptr, self.keys.host_lens, first=first)
        except RAISED as error:
            raise raised(error, "planning a graph") from error

    def _new(self, batch: ForwardBatch, shape: LatentShape) -> _Captured:
        b, q = batch.batch_size, batch.num_tokens // max(1, batch.batch_size)
        device, query_starts = self._cache.device, torch.arange(0, (b + 1) * q, q, dtype=torch.int32)
        starts = self._queries.setdefault(
            q, torch.arange(0, (self._max_batch_size + 1) * q, q, dtype=torch.int32, device=device)
        )
        with errors_of("a new wrapper for a graph"):
            wrapper = self._library.mla_wrapper(
                workspace(device),
                use_cuda_graph=True,
                qo_indptr=starts[: b + 1],
                kv_indptr=self.keys.indptr(b),
                kv_indices=self.keys.indices,
                kv_len_arr=self._lens[:b],
                backend=self._kernels,
            )
            plan_latent(
                wrapper,
                self._library,
                shape,
                self._config,
                self._cache,
                causal=q > 1,
                query_starts=query_starts,
                indptr=self.keys.host_indptr,
                indices=self.keys.indices[: int(self.keys.host_indptr[-1])],
                lens=self.keys.host_lens,
            )
        # one set of plan tables for all batch sizes: one graph runs at a time, each planned just before it runs
        made = wrapper._planned_backend
        tables = self._workspaces.get((shape, q))
        if tables is None:
            tables = self._workspaces[shape, q] = self._tables.workspace()
        made._int_workspace_buffer = tables
        sizes = (shape.padded_heads, shape.latent_dim, made._causal)
        return _Captured(wrapper, Replanned(made, _planner(made._cached_module), query_starts, sizes))


def _planner(module: Any) -> Callable[..., Any]:
    """The planner of a compiled module, and the copy of what it wrote.

    The library's own, around it, allocates page-locked memory for each plan and copies the tables there first, since
    its wrapper may plan again at once; `PlanTables` has memory that takes turns.
    """
    plan = module._module.plan

    def call(floats: Tensor, tables: Tensor, piece: Tensor, *lengths_and_sizes: Any) -> Any:
        layout, size = plan(floats, tables, piece, *lengths_and_sizes)
        tables[:size].copy_(piece[:size], non_blocking=True)
        return layout

    return call
