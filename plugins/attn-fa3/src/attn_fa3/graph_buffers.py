"""The buffers that captured graphs read: one set for all batch sizes, refilled before every replay."""

from __future__ import annotations

from dataclasses import replace

import torch
from attn_core.errors import BatchError, CapacityError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, TreeMask
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

#: What the parts of one layer's split attention may take, in bytes: it bounds the fixed number of splits of a graph.
SPLIT_BUDGET = 32 << 20
MAX_SPLITS = 32


class GraphBuffers:
    """seq_lens [max_batch], query_start_loc [max_batch + 1], page_table [max_batch, pages] and, once a tree or a cross
    batch is captured, their masks and tables. A replay copies the batch into them: three small copies, no allocation.
    """

    def __init__(self, config: AttentionConfig, cache: KVCache, max_batch_size: int) -> None:
        device = cache.device
        pages = cache.num_pages if config.max_context_len is None else -(-config.max_context_len // cache.page_size)
        self.max_batch_size = max_batch_size
        self.page_size = cache.page_size
        self.seq_lens = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(max_batch_size + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(max_batch_size, pages, dtype=torch.int32, device=device)
        self.encoder_seq_lens: Tensor | None = None
        self.encoder_page_table: Tensor | None = None
        self.visible: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        optional = (self.encoder_seq_lens, self.encoder_page_table, *self.visible.values())
        tensors = (self.seq_lens, self.query_start_loc, self.page_table, *optional)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def capture(self, batch: ForwardBatch) -> ForwardBatch:
        """``batch`` with these buffers in place of its tensors, which are copied into them; lengths are bounded by the
        buffers, not by the batch. Makes what a first tree or cross batch needs."""
        b = batch.batch_size
        if b > self.max_batch_size:
            raise CapacityError(f"a graph of {b} requests", accepted=f"up to {self.max_batch_size}, as announced")
        if batch.tree is not None:
            q = batch.tree.num_draft_tokens
            self.visible.setdefault(q, self.seq_lens.new_zeros(self.max_batch_size, q, q, dtype=torch.bool))
        if batch.encoder_seq_lens is not None and self.encoder_seq_lens is None:
            self.encoder_seq_lens = torch.zeros_like(self.seq_lens)
            self.encoder_page_table = torch.zeros_like(self.page_table)
        self.refill(batch)
        width = self.page_table.shape[1] * self.page_size
        captured = replace(
            batch,
            seq_lens=self.seq_lens[:b],
            query_start_loc=self.query_start_loc[: b + 1],
            page_table=self.page_table[:b],
            max_seq_len=width,
            plan_state=None,
        )
        if batch.tree is not None:
            captured.tree = TreeMask(self.visible[batch.tree.num_draft_tokens][:b])
        if self.encoder_seq_lens is not None and self.encoder_page_table is not None:
            captured.encoder_seq_lens = self.encoder_seq_lens[:b]
            captured.encoder_page_table = self.encoder_page_table[:b]
            captured.max_encoder_seq_len = width
        return captured

    def refill(self, batch: ForwardBatch) -> None:
        """Copy ``batch`` into the buffers. Raises BatchError for a page table wider than was announced."""
        b = batch.batch_size
        self.seq_lens[:b].copy_(batch.seq_lens)
        self.query_start_loc[: b + 1].copy_(batch.query_start_loc)
        self._fill_table(self.page_table, batch.page_table)
        if batch.tree is not None:
            visible = self.visible.get(batch.tree.num_draft_tokens)
            if visible is None:
                raise BatchError(f"a tree of {batch.tree.num_draft_tokens} drafts was not captured")
            visible[:b].copy_(batch.tree.visible)
        if batch.encoder_seq_lens is not None and batch.encoder_page_table is not None:
            if self.encoder_seq_lens is None or self.encoder_page_table is None:
                raise BatchError("a batch with encoder keys was not captured")
            self.encoder_seq_lens[:b].copy_(batch.encoder_seq_lens)
            self._fill_table(self.encoder_page_table, batch.encoder_page_table)

    def _fill_table(self, table: Tensor, given: Tensor) -> None:
        b, width = given.shape
        if width > table.shape[1]:
            raise BatchError(
                f"a page table of {width} pages a request in a graph for {table.shape[1]}",
                accepted="at most max_context_len of the config, in pages",
                hint="plan with a larger max_context_len",
            )
        table[:b, :width].copy_(given)


def fixed_splits(config: AttentionConfig, num_tokens: int) -> int:
    """The number of splits of a captured graph: as many as the budget holds, at most 32.

    A part is out and log-sum-exp in fp32, for each token, head and split. How many of them a request really gets is
    decided on the device, from its length; this is the bound.
    """
    if config.batch_invariant:
        return 1
    bytes_of_one = max(4 * num_tokens * k.num_q_heads * (k.v_head_dim + 1) for k in config.layers)
    return max(1, min(MAX_SPLITS, SPLIT_BUDGET // max(1, bytes_of_one)))
