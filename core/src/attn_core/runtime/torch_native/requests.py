"""Attention request by request: prefill with or without a prefix, mixed steps, drafts, cross-attention, ragged keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native import visibility
from attn_core.runtime.torch_native.maths import NEG_INF, attend

#: Scores held at once, in elements: a block of queries is as long as this allows.
BLOCK_SCORES = 1 << 24


@dataclass(slots=True)
class Sight:
    """What the queries of one request see: L queries over S keys, the last query at the last key unless told otherwise.

    ``tree`` [L, L] bool, ``spans`` [n, 2]. ``causal`` False sees every key; a window still bounds how far back.
    """

    causal: bool = True
    window: int | None = None
    tree: Tensor | None = None
    spans: Tensor | None = None


def attend_request(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, sight: Sight) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, fp32 [L, Hq, Dv] and [L, Hq], without the sink: q [L, Hq, D], k [S, Hkv, D], v [S, Hkv, Dv]."""
    length, keys = q.shape[0], k.shape[0]
    if keys < length and sight.tree is not None:  # a padded request
        return q.new_zeros(length, layer.num_q_heads, v.shape[-1]).float(), q.new_full(q.shape[:2], NEG_INF).float()
    block = max(1, BLOCK_SCORES // max(1, layer.num_q_heads * keys))
    outs, lses = [], []
    for start in range(0, length, block):
        stop = min(length, start + block)
        visible = _visible(start, stop, length, keys, sight, q.device)
        out, lse = attend(q[None, start:stop], k[None], v[None], layer, None if visible is None else visible[None])
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses)


def _visible(start: int, stop: int, length: int, keys: int, sight: Sight, device: torch.device) -> Tensor | None:
    """[stop - start, S] bool for the queries ``start`` to ``stop - 1``, or None for all."""
    prefix = keys - length
    key_positions = visibility.positions(0, keys, device)
    if sight.tree is not None:
        return _visible_drafts(start, stop, prefix, key_positions, sight)
    query_positions = visibility.positions(prefix + start, prefix + stop, device)
    if not sight.causal:
        if sight.window is None:
            return None
        return visibility.within(query_positions[:, None], key_positions, sight.window)
    seen = visibility.causal(query_positions, key_positions, None)
    if sight.spans is not None:
        seen |= visibility.same_span(query_positions, key_positions, sight.spans)
    if sight.window is not None:
        seen &= visibility.within(query_positions[:, None], key_positions, sight.window)
    return seen


def _visible_drafts(start: int, stop: int, prefix: int, key_positions: Tensor, sight: Sight) -> Tensor:
    assert sight.tree is not None
    positions = prefix + sight.tree.sum(-1) - 1
    drafts = visibility.drafts(sight.tree, positions, sight.window)[start:stop]
    before = visibility.causal(positions[start:stop], key_positions[:prefix], sight.window)
    return torch.cat([before, drafts], dim=1)
