"""Which query sees which key, as bool masks built from positions."""

from __future__ import annotations

from torch import Tensor


def seen_by(
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    window: int | None = None,
    spans: Tensor | None = None,
    drafts: Tensor | None = None,
    first_draft: Tensor | int = 0,
    causal: bool = True,
) -> Tensor:
    """[..., L, S] bool from positions [..., L] and [..., S], with leading dimensions that broadcast.

    Causal: keys not after the query. ``drafts`` [..., L, S] replaces that for keys from position ``first_draft`` on:
    which draft token sees which. ``spans`` [..., n, 2]: tokens of one half-open span see each other both ways. A window
    bounds how far back, in positions, whatever else holds.
    """
    query, key = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    seen = (key <= query) if causal else (key == key)
    if drafts is not None:
        seen = ((key < first_draft) & seen) | drafts
    if spans is not None:
        seen = seen | same_span(query_positions, key_positions, spans)
    return seen if window is None else seen & (key > query - window)


def same_span(query_positions: Tensor, key_positions: Tensor, spans: Tensor) -> Tensor:
    """[..., L, S] bool: query and key lie in one of the half-open ``spans`` [..., n, 2]; (0, 0) holds nothing."""
    in_query, in_key = _inside(query_positions, spans), _inside(key_positions, spans)
    return (in_query.unsqueeze(-2) & in_key.unsqueeze(-3)).any(-1)


def _inside(positions: Tensor, spans: Tensor) -> Tensor:
    """[..., L, n] bool: which of the ``spans`` [..., n, 2] hold each of the positions [..., L]."""
    start, stop = spans[..., None, :, 0], spans[..., None, :, 1]
    return (positions.unsqueeze(-1) >= start) & (positions.unsqueeze(-1) < stop)
