"""A sink that the operator does not take, added exactly afterwards through the LSE."""

from __future__ import annotations

import torch
from torch import Tensor


def add_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out [T, Hq, Dv] and lse [T, Hq] without a sink -> with one more logit ``sinks`` [Hq] in the denominator.

    The denominator e^lse becomes e^lse + e^sink, so out shrinks by e^lse / (e^lse + e^sink) = sigmoid(lse - sink).
    """
    sink = sinks.float()
    share = torch.sigmoid(lse - sink)
    return (out.float() * share[..., None]).to(out.dtype), torch.logaddexp(lse, sink)
