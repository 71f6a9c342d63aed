"""The definition of attention in plain torch: scores, cap, mask, softmax in fp32, sink, log-sum-exp."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from attn_core.runtime.layer import AttentionLayer

NEG_INF: Final = float("-inf")


def attend(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over these keys, without the sink: q [N, L, Hq, D], k [N, S, Hkv, D], v [N, S, Hkv, Dv].

    ``visible`` [N, L, S] bool (N or L may be 1), or None for all. Returns fp32 out [N, L, Hq, Dv] and lse [N, L, Hq]; a
    query that sees nothing has out 0 and lse -inf. Keys that nobody sees may hold NaN: their scores are replaced, but
    their values must have been cleared (``clear_unseen``).
    """
    n, length, heads, dim = q.shape
    kv_heads, group = layer.num_kv_heads, layer.group_size
    if not k.shape[1]:
        return empty_state(n, length, heads, v.shape[-1], device=q.device)
    grouped = (q.float() * layer.scale).view(n, length, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(grouped.reshape(n, kv_heads, group * length, dim), k.float().permute(0, 2, 3, 1))
    scores = cap(scores, layer.softcap).view(n, kv_heads, group, length, -1)
    if visible is not None:
        scores = scores.masked_fill_(~visible[:, None, None], NEG_INF)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == NEG_INF, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.view(n, kv_heads, group * length, -1), v.float().transpose(1, 2))
    out = out.view(n, kv_heads, group, length, -1) / total.masked_fill(total == 0, 1.0)
    lse = (top + torch.log(total)).squeeze(-1)
    return (
        out.permute(0, 3, 1, 2, 4).reshape(n, length, heads, -1),
        lse.permute(0, 3, 1, 2).reshape(n, length, heads),
    )


def cap(scores: Tensor, softcap: float) -> Tensor:
    """``scores`` with the soft cap, in place; a cap of 0 is off."""
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def clear_unseen(v: Tensor, seen: Tensor) -> Tensor:
    """v [N, S, Hkv, Dv] with 0 where ``seen`` [N, S] is False: a weight of 0 times NaN would still be NaN."""
    return v.masked_fill(~seen[:, :, None, None], 0.0)


def empty_state(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of queries that see nothing: out ``shape`` [..., Hq, Dv] zeros, lse [..., Hq] -inf, fp32."""
    return torch.zeros(shape, device=device), torch.full(shape[:-1], NEG_INF, device=device)


def add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, fp32, with one more logit per head in the denominator: sinks [Hq], out [..., Hq, Dv].

    e^lse / (e^lse + e^sink) = sigmoid(lse - sink). The lse counts the sink.
    """
    sinks = sinks.float()
    return out.float() * torch.sigmoid(lse - sinks)[..., None], torch.logaddexp(lse, sinks)
