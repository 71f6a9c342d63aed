"""From the partial results of runs to outputs: joined by their log-sum-exp, the sink added, rows in order."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

#: Log-sum-exps below this are of rows that saw no key (`MASKED` of the kernel, in natural logarithms, and some room).
_SAW_NOTHING: Final = -5e5


def join(partial: Tensor, lse: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """partial [runs * rows, Dv] fp32, lse [runs * rows] of base 2 -> out [T, Hq, Dv], lse [T, Hq] natural, both fp32.

    ``shape`` is (runs, Hkv, T, G). A row without keys has out 0 and lse -inf. Runs that were not computed have lse
    -inf, and whatever their partial result holds counts for nothing.
    """
    runs, kv_heads, tokens, group = shape
    natural = lse.view(runs, -1) * math.log(2)
    natural = natural.masked_fill(natural < _SAW_NOTHING, float("-inf"))
    values = partial.view(runs, natural.shape[1], -1)
    top = natural.amax(0).clamp(min=_SAW_NOTHING)
    weight = torch.exp(natural - top)
    total = weight.sum(0)
    joined = torch.where(weight[..., None] > 0, values * weight[..., None], 0.0).sum(0)
    joined = joined / total.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    whole = torch.where(total > 0, top + torch.log(total), float("-inf"))
    out = joined.view(kv_heads, tokens, group, -1).transpose(0, 1).flatten(1, 2)
    return out, whole.view(kv_heads, tokens, group).transpose(0, 1).flatten(1, 2)


def add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit ``sinks`` [Hq] in the denominator: e^lse / (e^lse + e^sink) = sigmoid(lse - sink)."""
    sink = sinks.float()
    return out * torch.sigmoid(lse - sink)[..., None], torch.logaddexp(lse, sink)
