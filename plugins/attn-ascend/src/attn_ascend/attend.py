"""Attention of MHA and GQA layers: one call for all tokens where the layout TND takes the head, else rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_ascend.keys import Keys, PagedKeys
from attn_ascend.sight import ALL_KEYS, Sight, sight_of
from attn_ascend.step import Lengths, Run

Output = tuple[Tensor, Tensor | None]

#: Head widths (qk, v) of the layout TND, over pages and over given keys.
TOKEN_WIDTHS_PAGED: Final = frozenset({(128, 128)})
TOKEN_WIDTHS_GIVEN: Final = frozenset({(128, 128), (192, 192), (192, 128)})


class FusedAttention(Protocol):
    """The fused operator, called at once or captured into a graph: -> (out like ``shape``, lse or None)."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, shape: tuple[int, ...], lse: bool, **arguments: object
    ) -> Output: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call is asked for besides attention: an LSE, a sink [Hq] of the operator's own, causality."""

    lse: bool = False
    sink: Tensor | None = None
    causal: bool = True


def takes_tokens(layer: AttentionLayer, *, paged: bool) -> bool:
    """Whether the layout TND takes heads of this layer."""
    widths = (layer.qk_head_dim, layer.v_head_dim)
    return widths in (TOKEN_WIDTHS_PAGED if paged else TOKEN_WIDTHS_GIVEN)


def attend(
    fused: FusedAttention, q: Tensor, keys: Keys, layer: AttentionLayer, lengths: Lengths, wanted: Wanted
) -> Output:
    """out [T, Hq, Dv] in q's dtype and, if wanted, lse [T, Hq] fp32. q is contiguous.

    Queries that see no key have unspecified rows.
    """
    if takes_tokens(layer, paged=isinstance(keys, PagedKeys)):
        return _attend_tokens(fused, q, keys, layer, lengths, wanted)
    return _attend_rows(fused, q, keys, layer, lengths, wanted)


def _attend_tokens(
    fused: FusedAttention, q: Tensor, keys: Keys, layer: AttentionLayer, lengths: Lengths, wanted: Wanted
) -> Output:
    key, value, arguments = keys.tokens(lengths)
    sight = sight_of(wanted.causal, layer.sliding_window, lengths.pairs)
    out, lse = fused(
        q, key, value, shape=(*q.shape[:2], layer.v_head_dim), lse=wanted.lse, input_layout="TND",
        actual_seq_qlen=lengths.query_ends, learnable_sink=wanted.sink,
        **_heads(layer), **sight.arguments(q.device), **arguments,
    )  # fmt: skip
    return out, None if lse is None else lse.squeeze(-1)


def _attend_rows(
    fused: FusedAttention, q: Tensor, keys: Keys, layer: AttentionLayer, lengths: Lengths, wanted: Wanted
) -> Output:
    runs = keys.runs(lengths)
    if len(runs) == 1 and runs[0].rows == slice(0, q.shape[0]):
        return _attend_run(fused, q, keys, layer, lengths, wanted, runs[0])
    out = q.new_empty(*q.shape[:2], layer.v_head_dim)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if wanted.lse else None
    for run in runs:
        out[run.rows], part = _attend_run(fused, q[run.rows], keys, layer, lengths, wanted, run)
        if lse is not None and part is not None:
            lse[run.rows] = part
    return out, lse


def _attend_run(
    fused: FusedAttention, q: Tensor, keys: Keys, layer: AttentionLayer, lengths: Lengths, wanted: Wanted, run: Run
) -> Output:
    """Requests of one query length as a rectangle [requests, queries, Hq, D]."""
    key, value, arguments = keys.rows(run, lengths)
    rows = q.view(run.last - run.first, run.queries, *q.shape[1:])
    sight = _sight_of_run(layer, lengths, wanted, run)
    if run.queries == 1 and layer.sliding_window is not None:
        # The operator ignores the mode for a single query, and with it the window. A copy of the query in front makes
        # two of it: the second stands at the last key as it should, the first is thrown away.
        rows = rows.repeat(1, 2, 1, 1)
    shape = (*rows.shape[:3], layer.v_head_dim)
    out, lse = fused(
        rows, key, value, shape=shape, lse=wanted.lse, input_layout="BSND",
        **_heads(layer), **sight.arguments(q.device), **arguments,
    )  # fmt: skip
    out = out[:, -run.queries :].reshape(-1, *shape[2:])
    return out, None if lse is None else lse.squeeze(-1)[..., -run.queries :].transpose(1, 2).reshape(q.shape[:2])


def _sight_of_run(layer: AttentionLayer, lengths: Lengths, wanted: Wanted, run: Run) -> Sight:
    if run.queries == 1 and layer.sliding_window is None:
        return ALL_KEYS  # the last query sees every key
    return sight_of(wanted.causal, layer.sliding_window, lengths.pairs[run.first : run.last])


def _heads(layer: AttentionLayer) -> dict[str, object]:
    return {
        "num_query_heads": layer.num_q_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "softmax_scale": layer.scale,
    }
