"""Attention of fixed shapes over the whole page table: decode and verify on accelerators, eager or in a captured graph.

Every operation has shapes known on the host and none waits for the device, so the same code is captured and replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_core.runtime.torch_native import visibility
from attn_core.runtime.torch_native.maths import attend, clear_unseen
from attn_core.runtime.torch_native.pages import dequantize, gather_pages
from attn_core.runtime.torch_native.plan_state import PaddedStep

#: Elements of K gathered at a time, so that long contexts do not double the cache.
CHUNK_ELEMENTS = 1 << 24


def attend_padded(q: Tensor, layer: AttentionLayer, kv_cache: KVCache, step: PaddedStep) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, fp32 [T, Hq, Dv] and [T, Hq], without the sink: q [B * query_len, Hq, D]."""
    lens, table = step.seq_lens, step.page_table
    if layer.cross:
        assert step.encoder_seq_lens is not None
        assert step.encoder_page_table is not None
        lens, table = step.encoder_seq_lens, step.encoder_page_table
    grouped = q.view(lens.shape[0], step.query_len, *q.shape[1:])
    state: tuple[Tensor, Tensor] | None = None
    width = table.shape[1]
    pages_at_once = _pages_at_once(layer, kv_cache, lens.shape[0])
    for first in range(0, width, pages_at_once):
        last = min(width, first + pages_at_once)
        part = _attend_pages(grouped, layer, kv_cache, step, lens, table[:, first:last], first * kv_cache.page_size)
        state = part if state is None else merge_state(state, part)
    assert state is not None, "a page table has at least one column"
    return state[0].flatten(0, 1), state[1].flatten(0, 1)


def _pages_at_once(layer: AttentionLayer, kv_cache: KVCache, batch_size: int) -> int:
    row = max(1, batch_size) * kv_cache.page_size * layer.num_kv_heads * layer.qk_head_dim
    return max(1, CHUNK_ELEMENTS // row)


def _attend_pages(
    q: Tensor,
    layer: AttentionLayer,
    kv_cache: KVCache,
    step: PaddedStep,
    lens: Tensor,
    table: Tensor,
    first_position: int,
) -> tuple[Tensor, Tensor]:
    """q [B, L, Hq, D] over the pages ``table`` [B, n], whose first token stands at ``first_position``."""
    count = table.shape[1] * kv_cache.page_size
    positions = visibility.positions(first_position, first_position + count, lens.device)
    valid = positions < lens[:, None]
    # Entries past a request's end are unspecified: they may not even be page ids.
    ids = torch.where(valid[:, :: kv_cache.page_size], table, 0)
    k = gather_pages(kv_cache.k_nhd(layer.layer_id), ids).flatten(1, 2)
    v = k if layer.kind == "mla" else gather_pages(kv_cache.v_nhd(layer.layer_id), ids).flatten(1, 2)
    k = dequantize(k, layer.k_scale)
    v = dequantize(v, layer.k_scale if layer.kind == "mla" else layer.v_scale)[..., : layer.v_head_dim]
    visible = valid[:, None] if layer.cross else _visible(layer, step, lens, positions) & valid[:, None]
    return attend(q, k, clear_unseen(v, valid), layer, visible)


def _visible(layer: AttentionLayer, step: PaddedStep, lens: Tensor, positions: Tensor) -> Tensor:
    """[B, L, S] bool for the new tokens of every request over the keys at ``positions`` [S]."""
    length = step.query_len
    places = lens[:, None] - length + torch.arange(length, device=lens.device)
    if step.tree is None:
        return visibility.causal(places, positions.expand(lens.shape[0], -1), layer.sliding_window)
    prefix = lens[:, None] - length
    query_positions = prefix + step.tree.sum(-1) - 1
    seen = visibility.causal(query_positions, positions.expand(lens.shape[0], -1), layer.sliding_window)
    seen = seen & (positions < prefix)[:, None]
    drafts = visibility.drafts(step.tree, query_positions, layer.sliding_window)
    # A key of the draft lies at place - prefix in the tree; others take column 0 and are masked away.
    column = positions - prefix
    inside = (column >= 0) & (column < length)
    column = column.clamp(0, length - 1)[:, None].expand(-1, length, -1)
    return seen | (drafts.gather(2, column) & inside[:, None])
