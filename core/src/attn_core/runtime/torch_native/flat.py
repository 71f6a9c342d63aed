"""FlatStep: decode on a CPU over a flat list of blocks of keys: nothing padded to the longest, no loop over requests.

The keys of all requests are cut into blocks of a few tokens. Scores of all blocks come from batched products over rows
gathered a cache's worth at a time; the softmax is one per request over its blocks; the weighted sum of values reads the
pool in place (``embedding_bag``), where a group has few heads. What depends on lengths and pages alone is made once per
step and shared by its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_core.runtime.torch_native.maths import NEG_INF, cap, empty_state
from attn_core.runtime.torch_native.pages import RowTable, fp8_to_float
from attn_core.runtime.torch_native.step import missing_encoder

#: Tokens in a block: long enough for a matrix product, short enough to waste little at the end of a request.
BLOCK: Final = 128
#: Bytes of keys gathered at a time, to be read again while they are in the processor's cache.
GATHER_BYTES: Final = 2 << 20
#: Scores held at a time, in elements.
SCORE_ELEMENTS: Final = 1 << 24
#: Above this many query heads a KV head, a product over gathered values beats reading them in place once per head.
IN_PLACE_GROUP: Final = 8


@dataclass(slots=True)
class Blocks:
    """Keys of B requests in n blocks of BLOCK tokens: a request's blocks follow each other.

    ``owner`` [n]: the request. ``pages``, ``offsets`` [n, BLOCK]: where each key is; beyond a request's end its last
    key is named again, so that nothing else is read, and ``shown`` [n, 1, 1, BLOCK] fp32 is 0 instead of 1.
    """

    owner: Tensor
    pages: Tensor
    offsets: Tensor
    shown: Tensor
    num_requests: int
    rows: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    bags: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, seq_lens: Tensor, page_table: Tensor, page_size: int, window: int | None) -> Blocks:
        """The last ``window`` keys of every request, or all of them."""
        lens = seq_lens.long()
        first = torch.zeros_like(lens) if window is None else (lens - window).clamp_(min=0)
        counts = (lens - first + BLOCK - 1) // BLOCK
        owner = torch.repeat_interleave(counts)
        number = torch.arange(owner.shape[0]) - (counts.cumsum(0) - counts)[owner]
        positions = (first[owner] + number * BLOCK)[:, None] + torch.arange(BLOCK)
        end = lens[owner][:, None]
        shown = (positions < end).float()
        positions = torch.minimum(positions, end - 1)
        pages = page_table[owner[:, None], positions // page_size]
        return cls(owner, pages, positions % page_size, shown[:, None, None], lens.shape[0])

    def part(self, first: int, last: int) -> Blocks:
        """The blocks ``first`` to ``last - 1``."""
        cut = slice(first, last)
        return Blocks(self.owner[cut], self.pages[cut], self.offsets[cut], self.shown[cut], self.num_requests)

    @property
    def count(self) -> int:
        return self.owner.shape[0]

    def rows_of(self, table: RowTable) -> Tensor:
        """[n, H, BLOCK]: the rows of ``table`` that hold the keys; the same for all layers of one layout."""
        if table.layout not in self.rows:
            self.rows[table.layout] = table.index(self.pages, self.offsets)
        return self.rows[table.layout]

    def bags_of(self, table: RowTable, group: int) -> tuple[Tensor, Tensor]:
        """For ``embedding_bag``: indices [n * H * group * BLOCK], and where the bag of each block and head begins."""
        key = (*table.layout, group)
        if key not in self.bags:
            small = table.rows.shape[0] < 1 << 31 and self.count * table.heads * group * BLOCK < 1 << 31
            dtype = torch.int32 if small else torch.int64
            rows = self.rows_of(table)[:, :, None].to(dtype).expand(-1, -1, group, -1).reshape(-1)
            self.bags[key] = rows, torch.arange(0, rows.shape[0], BLOCK, dtype=dtype)
        return self.bags[key]


@dataclass(slots=True)
class FlatStep:
    """One decode step: the batch, and its keys in blocks for each window among the layers (and for cross layers)."""

    batch: ForwardBatch
    slot_mapping: Tensor
    page_size: int
    blocks: dict[tuple[int | None, bool, int], list[Blocks]] = field(default_factory=dict)

    def attend(
        self, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        state: tuple[Tensor, Tensor] | None = None
        for blocks in self._blocks(layer):
            part = _attend_blocks(q, layer, kv_cache, blocks)
            state = part if state is None else merge_state(state, part)
        return empty_state(*q.shape[:-1], layer.v_head_dim, device=q.device) if state is None else state

    def _blocks(self, layer: AttentionLayer) -> list[Blocks]:
        """All keys of the step, in as many parts as their scores need."""
        key = layer.sliding_window, layer.cross, layer.num_q_heads
        if key not in self.blocks:
            lens, table = self.batch.seq_lens, self.batch.page_table
            if layer.cross:
                if self.batch.encoder_seq_lens is None or self.batch.encoder_page_table is None:
                    raise missing_encoder(layer)
                lens, table = self.batch.encoder_seq_lens, self.batch.encoder_page_table
            blocks = Blocks.of(lens, table, self.page_size, layer.sliding_window)
            at_once = max(1, SCORE_ELEMENTS // (layer.num_q_heads * BLOCK))
            self.blocks[key] = [blocks.part(i, i + at_once) for i in range(0, blocks.count, at_once)]
        return self.blocks[key]


def _attend_blocks(q: Tensor, layer: AttentionLayer, kv_cache: KVCache, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, fp32 [B, Hq, Dv] and [B, Hq], of q [B, Hq, D] over these blocks."""
    weights = _scores(q, layer, kv_cache, blocks)
    top, total = _softmax(weights, blocks)
    values = kv_cache.v_nhd(layer.layer_id, layer.v_head_dim)
    table = RowTable.of(values)
    if table.contiguous and values.dtype not in FP8_DTYPES and layer.group_size <= IN_PLACE_GROUP:
        sums = _values_in_place(weights.to(values.dtype), table, layer, blocks)
    else:
        sums = _gathered_values(weights, values.dtype, table, layer, blocks)
    heads = (blocks.num_requests, layer.num_q_heads)
    out = torch.zeros(*heads, layer.v_head_dim).index_add_(0, blocks.owner, sums.view(-1, *heads[1:], layer.v_head_dim))
    total = total.view(heads)
    value_scale = layer.k_scale if layer.kind == "mla" else layer.v_scale
    return out.mul_((value_scale / total.masked_fill(total == 0, 1.0))[..., None]), top.view(heads) + total.log()


def _scores(q: Tensor, layer: AttentionLayer, kv_cache: KVCache, blocks: Blocks) -> Tensor:
    """[n, Hkv, G, BLOCK] fp32, scaled and capped."""
    pool = kv_cache.k_nhd(layer.layer_id)
    table = RowTable.of(pool)
    kv_heads, group = layer.num_kv_heads, layer.group_size
    queries = (q.float() * (layer.scale * layer.k_scale)).view(-1, kv_heads, group, q.shape[-1])[blocks.owner]
    scores = torch.empty(blocks.count, kv_heads, group, BLOCK)
    for cut, rows in _gathered(table, pool.dtype, blocks):
        torch.bmm(queries[cut].flatten(0, 1), rows.transpose(1, 2), out=scores[cut].flatten(0, 1))
    return cap(scores, layer.softcap)


def _gathered(table: RowTable, dtype: torch.dtype, blocks: Blocks) -> Iterator[tuple[slice, Tensor]]:
    """Some blocks at a time, with their rows [blocks * H, width, D] in fp32, unscaled; the buffer is filled again."""
    index = blocks.rows_of(table)
    heads, dim = table.heads, table.rows.shape[1]
    at_once = max(1, GATHER_BYTES // (heads * BLOCK * dim * 4))
    size = min(at_once, blocks.count) * heads * BLOCK
    buffer = table.rows.new_empty(size, dim)
    for first in range(0, blocks.count, at_once):
        cut = slice(first, min(first + at_once, blocks.count))
        wanted = index[cut].flatten()
        rows = torch.index_select(table.rows, 0, wanted, out=buffer[: wanted.shape[0]])
        rows = fp8_to_float(rows.view(dtype)) if dtype in FP8_DTYPES else rows.float()
        yield cut, rows.view(-1, BLOCK, dim)


def _softmax(scores: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Turn ``scores`` [n, Hkv, G, BLOCK] into e^(score - top) in place, 0 where not shown.

    Returns top and total of each request, [B, Hkv, G, 1].
    """
    shape = (blocks.num_requests, *scores.shape[1:3], 1)
    owner = blocks.owner[:, None, None, None].expand(-1, *shape[1:])
    top = scores.new_full(shape, NEG_INF).scatter_reduce_(0, owner, scores.amax(-1, keepdim=True), "amax")
    scores.sub_(top[blocks.owner]).exp_().mul_(blocks.shown)
    return top, scores.new_zeros(shape).index_add_(0, blocks.owner, scores.sum(-1, keepdim=True))


def _values_in_place(weights: Tensor, table: RowTable, layer: AttentionLayer, blocks: Blocks) -> Tensor:
    """[n, Hq, Dv] fp32: the weighted sum over each block, read from the pool."""
    rows, starts = blocks.bags_of(table, layer.group_size)
    sums = embedding_bag(rows, table.rows, starts, mode="sum", per_sample_weights=weights.view(-1))
    return sums.float()


def _gathered_values(
    weights: Tensor, dtype: torch.dtype, table: RowTable, layer: AttentionLayer, blocks: Blocks
) -> Tensor:
    """[n, Hq, Dv] fp32: the weighted sum over each block, as products over gathered rows."""
    sums = torch.empty(*weights.shape[:3], layer.v_head_dim)
    for cut, rows in _gathered(table, dtype, blocks):
        torch.bmm(weights[cut].flatten(0, 1), rows, out=sums[cut].flatten(0, 1))
    return sums
