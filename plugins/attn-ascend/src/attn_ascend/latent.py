"""Absorbed MLA over latent rows [pages, page_size, 512 + 64]: read in place by ATB, or gathered for the fused operator.

The fused operator wants the latent and its rotary part as two contiguous tensors. A cache row holds both, so that path
copies the pages of the step once for each layer; it pays for itself where many queries share the copy. ATB's operator
reads whole rows, one query at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from attn_core.errors import ConfigError
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_ascend.attend import FusedAttention
from attn_ascend.copies import named_pages, places
from attn_ascend.operators import Operators
from attn_ascend.sight import ALL_KEYS, CAUSAL, Sight
from attn_ascend.step import Lengths, Run, Step, check_size

LATENT_WIDTH: Final = 512
ROTARY_WIDTH: Final = 64
#: Queries of one request that the fused operator takes in one piece with a latent of 512.
MAX_QUERIES: Final = 16
#: Requests that one call of ATB's operator takes.
MAX_ATB_REQUESTS: Final = 8192


@dataclass(frozen=True, slots=True)
class Expanded:
    """Every query as a request of its own, causally: the i-th of n queries sees the first m - n + i + 1 of m keys.

    table [T, pages] int32 on the device, lengths [T] int32 on the host.
    """

    table: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Gathered:
    """The pages of some requests, copied next to each other, and their queries in pieces of at most MAX_QUERIES.

    pages [N] int64: which pages. table [pieces, longest] int32: where each piece finds its keys among the copies.
    """

    pages: Tensor
    table: Tensor
    lengths: Lengths


def attend_latent(
    operators: Operators, fused: FusedAttention, q: Tensor, cache: Tensor, layer: AttentionLayer, step: Step
) -> Tensor:
    """out [T, Hq, 512] of contiguous q [T, Hq, 576] over the latent ``cache`` [pages, page_size, 576]."""
    out = q.new_empty(*q.shape[:2], layer.v_head_dim)
    for run in _runs(step.lengths):
        rows = run.rows
        if operators.paged_latent and (run.queries <= MAX_QUERIES or operators.fused != 2):
            _attend_in_place(operators, q[rows], cache, layer, expanded(step, run), out[rows])
        else:
            out[rows] = _attend_gathered(fused, q[rows], cache, layer, _gathered(step, run, cache.shape[1]), run)
    return out


def _runs(lengths: Lengths) -> list[Run]:
    """Requests that follow each other and are treated alike; a run of many queries is one request."""
    found = []
    for run in lengths.runs():
        if run.queries <= MAX_QUERIES:
            found.append(run)
            continue
        for i in range(run.last - run.first):
            found.append(Run(run.first + i, run.first + i + 1, run.queries, run.row + i * run.queries))
    return found


def _attend_in_place(
    operators: Operators, q: Tensor, cache: Tensor, layer: AttentionLayer, requests: Expanded, out: Tensor
) -> None:
    for start in range(0, q.shape[0], MAX_ATB_REQUESTS):
        part = slice(start, start + MAX_ATB_REQUESTS)
        operators.paged_latent_attention(
            q[part],
            cache.unsqueeze(2),
            layer.scale,
            requests.table[part],
            requests.lengths[part],
            layer.v_head_dim,
            out[part],
        )


def _attend_gathered(
    fused: FusedAttention, q: Tensor, cache: Tensor, layer: AttentionLayer, gathered: Gathered, run: Run
) -> Tensor:
    copies = cache.index_select(0, gathered.pages)
    latent = copies[..., :LATENT_WIDTH].contiguous()
    rotary = copies[..., LATENT_WIDTH:].contiguous()
    heads = _padded_heads(layer.num_q_heads)
    padded = _with_heads(q, heads)
    query, query_rotary = padded[..., :LATENT_WIDTH].contiguous(), padded[..., LATENT_WIDTH:].contiguous()
    layout, sight, lengths = _form(run, gathered.lengths)
    if layout == "BSND":
        query, query_rotary = query.unsqueeze(1), query_rotary.unsqueeze(1)
    out, _ = fused(
        query, latent, latent, shape=tuple(query.shape), lse=False, input_layout=layout,
        query_rope=query_rotary, key_rope=rotary,
        num_query_heads=heads, num_key_value_heads=1, softmax_scale=layer.scale,
        block_table=gathered.table, block_size=cache.shape[1], actual_seq_kvlen=gathered.lengths.keys,
        **lengths, **sight.arguments(q.device),
    )  # fmt: skip
    return out.view(q.shape[0], heads, LATENT_WIDTH)[:, : layer.num_q_heads]


def _form(run: Run, lengths: Lengths) -> tuple[str, Sight, dict[str, list[int]]]:
    """Single queries are rows without a mask, which is documented for them; several are tokens, causal."""
    if run.queries == 1:
        return "BSND", ALL_KEYS, {}
    return "TND", CAUSAL, {"actual_seq_qlen": lengths.query_ends}


def _padded_heads(heads: int) -> int:
    """The operator takes 1, 2, 4 ... 128 query heads."""
    return 1 << (heads - 1).bit_length()


def _with_heads(q: Tensor, heads: int) -> Tensor:
    if q.shape[1] == heads:
        return q
    padded = q.new_zeros(q.shape[0], heads, q.shape[2])
    padded[:, : q.shape[1]] = q
    return padded


def expanded(step: Step, run: Run) -> Expanded:
    """The requests of a run with every query as one of its own, made once for a step."""
    if run.first in step.expanded:
        return step.expanded[run.first]
    keys = step.lengths.keys[run.first : run.last]
    lengths = [m - run.queries + i + 1 for m in keys for i in range(run.queries)]
    table = step.table[run.first : run.last]
    if run.queries > 1:
        table = table.repeat_interleave(run.queries, 0)
    step.expanded[run.first] = Expanded(table, torch.tensor(lengths, dtype=torch.int32))
    return step.expanded[run.first]


def _gathered(step: Step, run: Run, page_size: int) -> Gathered:
    if run.first in step.gathered:
        return step.gathered[run.first]
    requests = range(run.first, run.last)
    counts = [-(-step.lengths.keys[b] // page_size) for b in requests]
    table: list[list[int]] = []
    lengths = Lengths([], [])
    for b, copies in zip(requests, places(counts), strict=True):
        for queries, keys in _pieces(run.queries, step.lengths.keys[b]):
            table.append(copies)
            lengths.queries.append(queries)
            lengths.keys.append(keys)
    check_size(lengths.queries, lengths.keys)
    pages = named_pages(step.table, requests, counts)
    step.gathered[run.first] = Gathered(pages, torch.tensor(table, dtype=torch.int32, device=pages.device), lengths)
    return step.gathered[run.first]


def _pieces(queries: int, keys: int) -> list[tuple[int, int]]:
    """(queries, keys) of each piece: of nearly the same length, so that none is a single query unless the run is."""
    count = -(-queries // MAX_QUERIES)
    ends = [queries * (i + 1) // count for i in range(count)]
    return [(end - start, keys - queries + end) for start, end in zip([0, *ends], ends, strict=False)]


def check_latent(layer: AttentionLayer) -> None:
    """Raise ConfigError for an MLA layer of other widths than the operators'."""
    if (layer.qk_head_dim, layer.v_head_dim) != (LATENT_WIDTH + ROTARY_WIDTH, LATENT_WIDTH):
        raise ConfigError(
            f"layer {layer.layer_id}: MLA of {layer.qk_head_dim}/{layer.v_head_dim}",
            accepted="576/512: kv_lora_rank 512, rope 64",
        )
