"""What both decode libraries need of a step: how many new tokens a request has, its lengths and its page table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from attn_core.errors import BatchError, CapacityError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

MODES: Final = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY)


@dataclass(slots=True, eq=False)
class LatentStep:
    """seq_lens [B] int32, page_table [B, pages] int32, ``query_len`` new tokens of every request, the longest length.

    ``shared`` holds what the layers of the step make once, each with the layer that made it: in a captured graph that
    layer makes it again whenever it comes by, so that a capture never keeps what a warm-up made.
    """

    query_len: int
    seq_lens: Tensor
    page_table: Tensor
    max_seq_len: int
    in_graph: bool
    shared: dict[object, tuple[int, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: ForwardBatch, *, name: str, in_graph: bool = False) -> LatentStep:
        """From a batch, without reading the device. Raises BatchError for a mode or a tree that these kernels lack."""
        if batch.mode not in MODES or batch.tree is not None:
            what = "a tree of drafts" if batch.tree is not None else batch.mode.name
            raise BatchError(
                f"{name} was given {what}",
                accepted=", ".join(mode.name for mode in MODES) + " of a chain",
                hint="plan this phase: it goes to the backends of the manifest's [fallback]",
            )
        query_len, rest = divmod(batch.num_tokens, max(1, batch.batch_size))
        if rest:
            raise BatchError(
                f"{batch.mode.name} with {batch.num_tokens} tokens of {batch.batch_size} requests",
                accepted="the same number of tokens for each request",
            )
        return cls(query_len, batch.seq_lens, batch.page_table, batch.max_seq_len, in_graph)

    def once(self, key: object, layer_id: int, make: Callable[..., Any], *arguments: Any) -> Any:
        """What ``make(*arguments)`` gave for ``key`` in this step."""
        found = self.shared.get(key)
        if found is None or (self.in_graph and found[0] == layer_id):
            found = self.shared[key] = (layer_id, make(*arguments))
        return found[1]


class LatentGraphBuffers:
    """The lengths and page tables that captured graphs read: one set for all batch sizes, two copies a replay."""

    def __init__(self, config: AttentionConfig, cache: KVCache, max_batch_size: int) -> None:
        pages = cache.num_pages if config.max_context_len is None else -(-config.max_context_len // cache.page_size)
        self.page_size = cache.page_size
        self.seq_lens = torch.zeros(max_batch_size, dtype=torch.int32, device=cache.device)
        self.page_table = torch.zeros(max_batch_size, pages, dtype=torch.int32, device=cache.device)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return self.seq_lens.nbytes + self.page_table.nbytes

    def capture(self, batch: ForwardBatch) -> ForwardBatch:
        """``batch`` with these buffers in place of its tensors, bounded by the buffers."""
        b = batch.batch_size
        if b > self.seq_lens.shape[0]:
            raise CapacityError(f"a graph of {b} requests", accepted=f"up to {self.seq_lens.shape[0]}, as announced")
        self.refill(batch)
        longest = self.page_table.shape[1] * self.page_size
        return replace(
            batch, seq_lens=self.seq_lens[:b], page_table=self.page_table[:b], max_seq_len=longest, plan_state=None
        )

    def refill(self, batch: ForwardBatch) -> None:
        """Copy ``batch`` into the buffers. Raises BatchError for a page table wider than was announced."""
        b, width = batch.page_table.shape
        if width > self.page_table.shape[1]:
            raise BatchError(
                f"a page table of {width} pages a request in a graph for {self.page_table.shape[1]}",
                accepted="at most max_context_len of the config, in pages",
                hint="plan with a larger max_context_len",
            )
        self.seq_lens[:b].copy_(batch.seq_lens)
        self.page_table[:b, :width].copy_(batch.page_table)
