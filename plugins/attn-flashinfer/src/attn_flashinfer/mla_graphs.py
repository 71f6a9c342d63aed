"""Captured graphs of MLA: the fixed buffers that all share, and the plan made again before a replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from attn_core.errors import BatchError, CapacityError, KernelError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_flashinfer.graphs import PLAN_BYTES, KeyBuffers
from attn_flashinfer.library import errors_of
from attn_flashinfer.mla_plan import LatentShape, MLAStep, plan_latent
from attn_flashinfer.wrappers import Staging, workspace


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """One captured batch size: query_starts [B + 1] int32 on the host, and a wrapper for each shape of layer."""

    query_starts: Tensor
    wrappers: dict[LatentShape, Any]


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
        self._tables: dict[tuple[LatentShape, int], Tensor] = {}
        self._staging = Staging(PLAN_BYTES, torch.uint8, cache.device)
        self._captured: dict[tuple[ForwardMode, int, int], _Captured] = {}

    def capture(self, batch: ForwardBatch, shapes: list[LatentShape]) -> MLAStep:
        """Wrappers over the shared buffers for every shape of layer, planned for ``batch``."""
        b = batch.batch_size
        if b > self._max_batch_size:
            raise CapacityError(f"a graph of {b} requests", accepted=f"up to {self._max_batch_size}, as announced")
        self.keys.refill(batch.seq_lens_cpu, batch.page_table)
        key = (batch.mode, b, batch.num_tokens)
        if key not in self._captured:
            starts = _starts(batch)
            self._captured[key] = _Captured(starts, {shape: self._new(batch, shape, starts) for shape in shapes})
        self._plan(self._captured[key])
        return MLAStep(dict(self._captured[key].wrappers))

    def replay(self, batch: ForwardBatch) -> None:
        """Plan again: the library's plan kernel tables alone, into the buffers that the graph reads.

        ``wrapper.plan`` would copy its 8 MiB of tables aside first, in case it fails. Raises BatchError for a batch
        size that was not captured, KernelError if the library lays the tables out otherwise than for the capture.
        """
        captured = self._captured.get((batch.mode, batch.batch_size, batch.num_tokens))
        if captured is None:
            sizes = sorted({b for mode, b, _ in self._captured if mode is batch.mode})
            raise BatchError(f"{batch.mode.name} of {batch.batch_size} requests was not captured", accepted=sizes)
        self.keys.refill(batch.seq_lens_cpu, batch.page_table)
        self._plan(captured)

    def _plan(self, captured: _Captured) -> None:
        for shape, wrapper in captured.wrappers.items():
            with errors_of("planning a graph"):
                self._plan_tables(wrapper._planned_backend, shape, captured.query_starts)

    def _plan_tables(self, made: Any, shape: LatentShape, query_starts: Tensor) -> None:
        plan_info = made._cached_module.plan(
            made._float_workspace_buffer,
            made._int_workspace_buffer,
            self._staging.take(),
            query_starts,
            self.keys.host_indptr,
            self.keys.host_lens,
            shape.padded_heads,
            shape.latent_dim,
            made._causal,
        )
        self._staging.mark_copied()
        if list(plan_info) != list(made._plan_info):
            raise KernelError(
                "FlashInfer laid out its plan otherwise than at capture",
                given=list(plan_info),
                accepted=list(made._plan_info),
                hint="capture again",
            )

    def _new(self, batch: ForwardBatch, shape: LatentShape, query_starts: Tensor) -> Any:
        b, q = batch.batch_size, batch.num_tokens // max(1, batch.batch_size)
        device = self._cache.device
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
        made._int_workspace_buffer = self._tables.setdefault((shape, q), made._int_workspace_buffer)
        return wrapper


def _starts(batch: ForwardBatch) -> Tensor:
    q = batch.num_tokens // max(1, batch.batch_size)
    return torch.arange(0, (batch.batch_size + 1) * q, q, dtype=torch.int32)
