"""PageTableConversion: a backend that gets smaller pages than the cache has, by rewriting page ids, never the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer


class PageTableConversion(AttentionBackend):
    """Page p of n tokens is pages p*r to p*r+r-1 of n/r tokens in the same memory: the table is rewritten once a step.

    ``inner`` was built over ``kv_cache.with_page_size(n / r)``; slots mean the same in both. The step as ``inner`` sees
    it lies in ``batch.plan_state``.
    """

    def __init__(self, inner: AttentionBackend, kv_cache: KVCache) -> None:
        super().__init__(inner.config.replace(page_size=kv_cache.page_size), kv_cache)
        self.inner = inner
        self.ratio = kv_cache.page_size // inner.kv_cache.page_size
        if kv_cache.num_pages * self.ratio >= 1 << 31:
            raise ConfigError(
                f"{kv_cache.num_pages} pages of {kv_cache.page_size} seen in pages of {inner.kv_cache.page_size}",
                accepted="fewer than 2**31 pages: ids are int32",
            )
        self.cuda_graph_seq_len_fill_value = inner.cuda_graph_seq_len_fill_value  # type: ignore[misc]
        self._parts = torch.arange(self.ratio, dtype=torch.int32, device=kv_cache.device)
        self._tables: dict[str, Tensor] = {}
        self._max_batch_size = 0

    def warmup(self, config: AttentionConfig) -> None:
        self.inner.warmup(config.replace(page_size=self.inner.kv_cache.page_size))

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        encoder = batch.encoder_page_table
        converted = replace(
            batch,
            page_table=self._rewritten(batch.page_table),
            encoder_page_table=None if encoder is None else self._rewritten(encoder),
            plan_state=None,
        )
        self.inner.init_forward_metadata(converted)
        batch.plan_state = converted

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.inner.forward_extend(q, k, v, layer, batch.plan_state, **options)

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.inner.forward_decode(q, k, v, layer, batch.plan_state, **options)

    def forward_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.inner.forward_ragged(q, k, v, layer, **options)

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        self.inner.write_kv(k, v, layer, slot_mapping)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self.inner.init_cuda_graph_state(max_batch_size, max_num_tokens)
        self._max_batch_size = max_batch_size

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        converted = self._in_buffers(batch)
        self.inner.init_forward_metadata_capture_cuda_graph(converted)
        batch.plan_state = converted

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        converted = self._in_buffers(batch)
        self.inner.init_forward_metadata_replay_cuda_graph(converted)
        batch.plan_state = converted

    def _in_buffers(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch with its tables rewritten into buffers that stay; a replay allocates nothing."""
        encoder = batch.encoder_page_table
        return replace(
            batch,
            page_table=self._rewritten(batch.page_table, self._buffer("page_table", batch.page_table)),
            encoder_page_table=None
            if encoder is None
            else self._rewritten(encoder, self._buffer("encoder_page_table", encoder)),
            plan_state=None,
        )

    def _buffer(self, name: str, table: Tensor) -> Tensor:
        """[B, columns * ratio] int32 of the buffer ``name``, made at the first capture, as wide as it may get."""
        requests, columns = table.shape
        if name not in self._tables:
            most = max(columns, -(-(self.config.max_context_len or 0) // self.kv_cache.page_size))
            self._tables[name] = table.new_zeros(max(requests, self._max_batch_size), most * self.ratio)
        buffer = self._tables[name]
        if requests > buffer.shape[0] or columns * self.ratio > buffer.shape[1]:
            raise BatchError(
                f"a {name} of {requests} requests and {columns} columns in a graph",
                accepted=f"at most {buffer.shape[0]} and {buffer.shape[1] // self.ratio}, as first captured",
            )
        return buffer[:requests, : columns * self.ratio]

    def _rewritten(self, table: Tensor, out: Tensor | None = None) -> Tensor:
        """[B, m] ids as [B, m * ratio]: every id p becomes p*r to p*r+r-1."""
        requests, columns = table.shape
        if out is None:
            out = table.new_empty(requests, columns * self.ratio)
        torch.add(self._parts, table[:, :, None], alpha=self.ratio, out=out.view(requests, columns, self.ratio))
        return out
