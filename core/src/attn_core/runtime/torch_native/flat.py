"""FlatStep: decode on a CPU over a flat list of blocks of keys: nothing padded to the longest, no loop over requests.

The keys of all requests are cut into blocks of a few tokens. Where a group has few heads, keys and values are read in
place: the scores are the entries of a sparse product (``sampled_addmm``), the weighted sum of values is an
``embedding_bag``. Otherwise batched products run over rows gathered a cache's worth at a time. The softmax is one per
request over its blocks. What depends on lengths and pages alone is made once per step and shared by its layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_core.runtime.torch_native.maths import NEG_INF, cap, empty_state
from attn_core.runtime.torch_native.pages import RowTable, fp8_to_float
from attn_core.runtime.torch_native.step import missing_encoder

#: Tokens in a block: long enough for a matrix product, short enough to waste little at the end of a request.
BLOCK: Final = 128
#: Bytes of keys gathered at a time: they are read again from the processor's cache.
GATHER_BYTES: Final = 3 << 19
#: ``mode`` of embedding_bag: the sum of a bag's rows.
_SUM: Final = 0
#: Scores held at a time, in elements.
SCORE_ELEMENTS: Final = 1 << 24
#: Up to this many query heads a KV head, reading in place once per query head beats a product over gathered rows.
IN_PLACE_GROUP_OF_KEYS: Final = 3
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
    pieces: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict)

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
            dtype = torch.int32 if table.rows.shape[0] < 1 << 31 else torch.int64
            self.rows[table.layout] = table.index(self.pages, self.offsets).to(dtype)
        return self.rows[table.layout]

    def pieces_of(self, table: RowTable, at_once: int) -> tuple[Tensor, ...]:
        """``rows_of`` flat, for ``at_once`` blocks at a time."""
        key = (*table.layout, at_once)
        if key not in self.pieces:
            self.pieces[key] = torch.split(self.rows_of(table).flatten(), at_once * table.heads * BLOCK)
        return self.pieces[key]

    def bags_of(self, table: RowTable, group: int) -> tuple[Tensor, Tensor]:
        """For ``embedding_bag``: indices [n * H * group * BLOCK], and where the bag of each block and head begins."""
        key = (*table.layout, group)
        if key not in self.bags:
            rows = self.rows_of(table)[:, :, None].expand(-1, -1, group, -1).reshape(-1)
            self.bags[key] = rows, torch.arange(0, rows.shape[0], BLOCK, dtype=rows.dtype)
        return self.bags[key]


@dataclass(slots=True)
class Scratch:
    """Memory that all layers of a step write gathered rows to, one after the other.

    Without it each layer would ask the system for memory anew, and the page faults cost more than the gathering.
    """

    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, role: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] with anything in it; what was taken for the same role and dtype before is no longer valid."""
        buffer = self.buffers.get((role, dtype))
        if buffer is None or buffer.numel() < rows * width:
            buffer = self.buffers[role, dtype] = torch.empty(rows * width, dtype=dtype)
        return buffer[: rows * width].view(rows, width)


@dataclass(slots=True)
class FlatStep:
    """One decode step: the batch, and its keys in blocks for each window among the layers (and for cross layers)."""

    batch: ForwardBatch
    slot_mapping: Tensor
    page_size: int
    blocks: dict[tuple[int | None, bool, int], list[Blocks]] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)

    def attend(
        self, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        state: tuple[Tensor, Tensor] | None = None
        for blocks in self._blocks(layer):
            part = _attend_blocks(q, layer, kv_cache, blocks, self.scratch)
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


def _attend_blocks(
    q: Tensor, layer: AttentionLayer, kv_cache: KVCache, blocks: Blocks, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, fp32 [B, Hq, Dv] and [B, Hq], of q [B, Hq, D] over these blocks."""
    queries = (q.float() * (layer.scale * layer.k_scale)).view(-1, layer.num_kv_heads, layer.group_size, q.shape[-1])
    queries = queries.index_select(0, blocks.owner)
    keys = kv_cache.k_nhd(layer.layer_id)
    values = None if layer.kind == "mla" else kv_cache.v_nhd(layer.layer_id)
    if values is not None and _can_stay(values, layer):
        parts = _values_in_place(queries, keys, values, layer, blocks, scratch)
    else:
        parts = _values_gathered(queries, keys, values, layer, blocks, scratch)
    return _joined(*parts, layer, blocks)


def _can_stay(values: Tensor, layer: AttentionLayer) -> bool:
    """Whether the weighted sum of values is read from the pool: rows that do not overlap, few heads to read them."""
    return layer.group_size <= IN_PLACE_GROUP and values.dtype not in FP8_DTYPES and RowTable.of(values).contiguous


def _values_in_place(
    queries: Tensor, keys: Tensor, values: Tensor, layer: AttentionLayer, blocks: Blocks, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Per block, fp32: weighted sums of values [n, Hkv, G, Dv], top and total [n, Hkv, G, 1]."""
    scores = _scores(queries, keys, layer, blocks, scratch)
    weights, top, total = _softmax(cap(scores, layer.softcap), blocks.shown)
    table = RowTable.of(values)
    rows, starts = blocks.bags_of(table, layer.group_size)
    weights = weights.to(values.dtype).view(-1)
    sums = torch.embedding_bag(table.rows, rows, starts, mode=_SUM, per_sample_weights=weights)[0]
    return sums.float().view(*queries.shape[:3], -1), top, total


def _scores(queries: Tensor, keys: Tensor, layer: AttentionLayer, blocks: Blocks, scratch: Scratch) -> Tensor:
    """[n, Hkv, G, BLOCK] of queries [n, Hkv, G, D], in scratch memory."""
    table = RowTable.of(keys)
    scores = scratch.take("scores", queries[..., 0].numel(), BLOCK, torch.float32)
    if _keys_can_stay(keys, table, layer):
        _multiply_in_place(queries.flatten(0, 2), table, blocks.bags_of(table, layer.group_size), scores)
    else:
        at_once = _at_once(keys)
        each = at_once * layer.num_kv_heads
        parts = (torch.split(x, each) for x in (queries.flatten(0, 1), scores.view(-1, layer.group_size, BLOCK)))
        for rows, q, out in zip(_gathered(keys, blocks, at_once, scratch), *parts, strict=True):
            torch.bmm(q, rows.transpose(1, 2), out=out)
    return scores.view(*queries.shape[:3], BLOCK)


def _keys_can_stay(keys: Tensor, table: RowTable, layer: AttentionLayer) -> bool:
    """Whether the scores are computed from the pool itself: the sparse product knows fp32 alone.

    A sparse matrix of more entries than places is cut by the kernel, so a block must not be longer than the table.
    """
    few = layer.group_size <= IN_PLACE_GROUP_OF_KEYS
    return few and keys.dtype is torch.float32 and table.contiguous and table.rows.shape[0] >= BLOCK


def _multiply_in_place(queries: Tensor, table: RowTable, bags: tuple[Tensor, Tensor], out: Tensor) -> None:
    """``out`` [m, BLOCK]: the products of each of queries [m, D] with the rows of its bag.

    They are the values of a sparse matrix [m, N]; nothing in the kernel needs a row's columns sorted, or each once.
    """
    rows, starts = bags
    _expect_sparse()
    ends = torch.cat([starts, starts.new_full((1,), rows.shape[0])])
    values = out.zero_().view(-1)  # the kernel adds to 0 times what is there, which may be anything
    size = (queries.shape[0], table.rows.shape[0])
    products = torch.sparse_csr_tensor(ends, rows, values, size=size, check_invariants=False)
    torch.sparse.sampled_addmm(products, queries, table.rows.t(), beta=0.0, out=products)


@cache
def _expect_sparse() -> None:
    """Torch says once a process that sparse matrices are in beta; no user of a backend can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), size=(1, 1)
        )


def _values_gathered(
    queries: Tensor, keys: Tensor, values: Tensor | None, layer: AttentionLayer, blocks: Blocks, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the rows of values gathered too; ``values`` None (MLA): they are the first Dv of the keys."""
    sums = torch.empty(*queries.shape[:3], layer.v_head_dim)
    tops, totals = [], []
    at_once = _at_once(keys)
    of_keys = _gathered(keys, blocks, at_once, scratch)
    of_values = None if values is None else _gathered(values, blocks, at_once, scratch, "values")
    parts = zip(*(torch.split(x, at_once) for x in (queries, blocks.shown, sums)), strict=True)
    for rows, (q, shown, out) in zip(of_keys, parts, strict=True):
        scores = torch.bmm(q.flatten(0, 1), rows.transpose(1, 2)).view(*q.shape[:3], BLOCK)
        weights, top, total = _softmax(cap(scores, layer.softcap), shown)
        value_rows = rows[..., : layer.v_head_dim] if of_values is None else next(of_values)
        torch.bmm(weights.flatten(0, 1), value_rows, out=out.flatten(0, 1))
        tops.append(top)
        totals.append(total)
    return sums, torch.cat(tops), torch.cat(totals)


def _at_once(keys: Tensor) -> int:
    """How many blocks of keys [pages, page_size, H, D] are gathered at a time."""
    return max(1, GATHER_BYTES // (BLOCK * keys.shape[2] * keys.shape[3] * 4))


def _gathered(pool: Tensor, blocks: Blocks, at_once: int, scratch: Scratch, role: str = "keys") -> Iterator[Tensor]:
    """For ``at_once`` blocks at a time their rows [blocks * H, BLOCK, D] in fp32, unscaled; each until the next."""
    table = RowTable.of(pool)
    for index in blocks.pieces_of(table, at_once):
        rows = scratch.take(role, index.shape[0], pool.shape[-1], table.rows.dtype)
        torch.index_select(table.rows, 0, index, out=rows)
        if pool.dtype in FP8_DTYPES:
            rows = fp8_to_float(rows.view(pool.dtype))
        elif pool.dtype is not torch.float32:
            rows = scratch.take(role, rows.shape[0], rows.shape[1], torch.float32).copy_(rows)
        yield rows.view(-1, BLOCK, pool.shape[-1])


def _softmax(scores: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``scores`` [n, Hkv, G, BLOCK] as e^(score - top) in place, 0 where not shown; top and total of each block."""
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_().mul_(shown)
    return weights, top, weights.sum(-1, keepdim=True)


def _joined(sums: Tensor, top: Tensor, total: Tensor, layer: AttentionLayer, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the requests, from what their blocks found: each rescaled to the request's own top."""
    shape = (blocks.num_requests, *top.shape[1:])
    owner = blocks.owner[:, None, None, None].expand_as(top)
    highest = top.new_full(shape, NEG_INF).scatter_reduce_(0, owner, top, "amax")
    factor = top.sub_(highest.index_select(0, blocks.owner)).exp_()
    whole = total.new_zeros(shape).index_add_(0, blocks.owner, total.mul_(factor))
    out = sums.new_zeros(*shape[:-1], layer.v_head_dim).index_add_(0, blocks.owner, sums.mul_(factor))
    value_scale = layer.k_scale if layer.kind == "mla" else layer.v_scale
    out = out.mul_(value_scale / whole.masked_fill(whole == 0, 1.0))
    return out.flatten(1, 2), (highest + whole.log()).flatten(1)
