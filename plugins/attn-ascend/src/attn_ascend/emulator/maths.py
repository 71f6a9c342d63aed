"""What the operators compute, in fp32 torch: attention of one request with a sparse mode, and reading pages."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_ascend.emulator.rules import need


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [n, Hq, Dv] and lse [n, Hq], fp32, of q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv]; ``seen`` [n, m].

    A query that sees no key gives NaN, LSE too: the chip's answer there is not documented, so nobody may use it.
    """
    n, heads, width = q.shape
    grouped = q.float().view(n, k.shape[1], heads // k.shape[1], width)
    scores = torch.einsum("nhgd,mhd->hgnm", grouped, k.float()) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        column = sink.float().view(k.shape[1], heads // k.shape[1], 1, 1).expand(-1, -1, n, 1)
        scores = torch.cat([scores, column], -1)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))
    lse = lse.masked_fill(lse == float("-inf"), float("nan"))
    weights = torch.exp(scores - lse[..., None])[..., : k.shape[0]]
    out = torch.einsum("hgnm,mhd->nhgd", weights, v.float()).reshape(n, heads, v.shape[-1])
    if not k.shape[0]:
        out = out.fill_(float("nan"))
    return out, lse.reshape(heads, n).transpose(0, 1)


def sight(mode: int, pre_tokens: int, next_tokens: int, queries: int, keys: int) -> Tensor | None:
    """[queries, keys] bool, which keys are seen; None for all.

    Modes 3 and 4 put the last query at the last key: in TI (CalcPostQuantTokensPerBatch) a band's pre_tokens become
    pre_tokens - keys + queries, and its next_tokens next_tokens + keys - queries, where the first query stands at 0.
    """
    if mode == 0:
        return None
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    if mode == 2:
        return j <= i
    if mode == 3:
        return j <= i + keys - queries
    return (i - j <= pre_tokens - keys + queries) & (j - i <= next_tokens + keys - queries)


def read_pages(cache: Tensor, row: Tensor, count: int, heads: int, rule: str) -> Tensor:
    """The first ``count`` tokens [count, heads, D] of a cache [blocks, size, heads * D] or [blocks, size, heads, D]."""
    size = cache.shape[1]
    blocks = row[: -(-count // size)].long()
    need(bool(((blocks >= 0) & (blocks < cache.shape[0])).all()), rule, f"blocks {blocks.tolist()} of {cache.shape[0]}")
    return cache[blocks].reshape(blocks.shape[0] * size, heads, -1)[:count]
