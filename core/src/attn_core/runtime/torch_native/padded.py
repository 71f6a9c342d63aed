"""PaddedStep: decode and verify in fixed shapes over the whole page table, on accelerators, eager or in graphs.

Every operation has shapes known on the host and none waits for the device, so the same code is captured and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_core.runtime.torch_native.maths import attend, clear_unseen
from attn_core.runtime.torch_native.pages import dequantize, gather_pages
from attn_core.runtime.torch_native.step import missing_encoder
from attn_core.runtime.torch_native.visibility import seen_by

#: Elements of K gathered at a time, so that a long context does not double the cache.
CHUNK_ELEMENTS: Final = 1 << 24


@dataclass(slots=True)
class PaddedStep:
    """``query_len`` new tokens a request: seq_lens [B], page_table [B, width], tree [B, q, q], spans [B, S, 2].

    The tensors are the batch's own, or the shared buffers that a captured graph reads.
    """

    query_len: int
    slot_mapping: Tensor
    seq_lens: Tensor
    page_table: Tensor
    tree: Tensor | None = None
    spans: Tensor | None = None
    encoder_seq_lens: Tensor | None = None
    encoder_page_table: Tensor | None = None

    @classmethod
    def of(cls, batch: ForwardBatch, query_len: int, page_size: int) -> PaddedStep:
        """Over the batch's own tensors; columns of the page tables past the longest request are left out."""
        encoder = batch.encoder_page_table
        return cls(
            query_len=query_len,
            slot_mapping=batch.slot_mapping,
            seq_lens=batch.seq_lens,
            page_table=batch.page_table[:, : _columns(batch.max_seq_len, page_size)],
            tree=None if batch.tree is None else batch.tree.visible,
            spans=batch.spans,
            encoder_seq_lens=batch.encoder_seq_lens,
            encoder_page_table=None
            if encoder is None
            else encoder[:, : _columns(batch.max_encoder_seq_len, page_size)],
        )

    def attend(
        self, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        lens, table = self.seq_lens, self.page_table
        if layer.cross:
            if self.encoder_seq_lens is None or self.encoder_page_table is None:
                raise missing_encoder(layer)
            lens, table = self.encoder_seq_lens, self.encoder_page_table
        grouped = q.reshape(lens.shape[0], self.query_len, *q.shape[1:])
        at_once = _pages_at_once(layer, kv_cache, lens.shape[0])
        state: tuple[Tensor, Tensor] | None = None
        for first in range(0, table.shape[1], at_once):
            pages = table[:, first : first + at_once]
            part = self._attend_pages(grouped, layer, kv_cache, lens, pages, first * kv_cache.page_size)
            state = part if state is None else merge_state(state, part)
        assert state is not None, "a page table has at least one column"
        return state[0].flatten(0, 1), state[1].flatten(0, 1)

    def _attend_pages(
        self,
        q: Tensor,
        layer: AttentionLayer,
        kv_cache: KVCache,
        lens: Tensor,
        pages: Tensor,
        first_position: int,
    ) -> tuple[Tensor, Tensor]:
        """q [B, L, Hq, D] over ``pages`` [B, n], whose first token stands at ``first_position``."""
        count = pages.shape[1] * kv_cache.page_size
        places = torch.arange(first_position, first_position + count, device=lens.device)
        valid = places < lens[:, None]
        # Entries past a request's end are unspecified: they may not even be page ids.
        ids = torch.where(valid[:, :: kv_cache.page_size], pages, 0)
        k = dequantize(gather_pages(kv_cache.k_nhd(layer.layer_id), ids).flatten(1, 2), layer.k_scale)
        if layer.kind == "mla":
            v = k[..., : layer.v_head_dim]
        else:
            v = dequantize(gather_pages(kv_cache.v_nhd(layer.layer_id), ids).flatten(1, 2), layer.v_scale)
        visible = valid[:, None] if layer.cross else self._seen(layer, places) & valid[:, None]
        return attend(q, k, clear_unseen(v, valid), layer, visible)

    def _seen(self, layer: AttentionLayer, places: Tensor) -> Tensor:
        """[B, L, S] bool: what the new tokens see of the keys at ``places`` [S] of every request."""
        prefix = self.seq_lens[:, None] - self.query_len
        if self.tree is None:
            queries = prefix + torch.arange(self.query_len, device=prefix.device)
            return seen_by(queries, places[None], window=layer.sliding_window, spans=self.spans)
        depth = self.tree.sum(-1) - 1
        # A draft token's key lies at place - prefix in the tree; other keys take a column that is masked away.
        column = places - prefix
        drafted = (column >= 0) & (column < self.query_len)
        column = column.clamp(0, self.query_len - 1)
        return seen_by(
            prefix + depth,
            torch.where(drafted, prefix + depth.gather(1, column), places),
            window=layer.sliding_window,
            spans=self.spans,
            drafts=self.tree.gather(2, column[:, None].expand(-1, self.query_len, -1)) & drafted[:, None],
            first_draft=prefix[..., None],
        )


def _columns(tokens: int, page_size: int) -> int:
    return max(1, -(-tokens // page_size))


def _pages_at_once(layer: AttentionLayer, kv_cache: KVCache, batch_size: int) -> int:
    row = max(1, batch_size) * kv_cache.page_size * layer.num_kv_heads * layer.qk_head_dim
    return max(1, CHUNK_ELEMENTS // row)
