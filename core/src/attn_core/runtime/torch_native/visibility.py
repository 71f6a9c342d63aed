"""Which query sees which key, as bool masks built from positions."""

from __future__ import annotations

import torch
from torch import Tensor


def causal(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """[..., L, S] bool from positions [..., L] and [..., S]: keys not after the query, the last ``window`` of them."""
    q, k = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    seen = k <= q
    return seen if window is None else seen & within(q, k, window)


def within(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Whether the key at position ``k`` is among the last ``window`` that the query at ``q`` may see."""
    return k > q - window


def same_span(query_positions: Tensor, key_positions: Tensor, spans: Tensor) -> Tensor:
    """[L, S] bool: both positions lie in one of the half-open ``spans`` [n, 2]; (0, 0) holds nothing."""
    q = (query_positions[:, None] >= spans[:, 0]) & (query_positions[:, None] < spans[:, 1])
    k = (key_positions[:, None] >= spans[:, 0]) & (key_positions[:, None] < spans[:, 1])
    return (q.float() @ k.float().T) > 0


def drafts(visible: Tensor, query_positions: Tensor, window: int | None) -> Tensor:
    """[..., q, q] bool: which draft token sees which, with the window counted in positions, not in places."""
    if window is None:
        return visible
    return visible & within(query_positions.unsqueeze(-1), query_positions.unsqueeze(-2), window)


def positions(start: int, stop: int, device: torch.device) -> Tensor:
    """The positions ``start`` to ``stop - 1``, int64."""
    return torch.arange(start, stop, device=device)
