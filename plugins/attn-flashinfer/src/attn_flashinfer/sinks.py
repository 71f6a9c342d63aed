"""Attention sinks folded into a finished output: exact, and right for every kernel and mask of the library."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

LN2: Final = math.log(2.0)


def fold_sinks(out: Tensor, lse: Tensor, sinks: Tensor, *, return_lse: bool) -> Tensor | None:
    """One more logit ``sinks`` [Hq]: in place for out [T, Hq, Dv]; lse [T, Hq], base 2, stays as it is, and the new one
    comes back, natural, if wanted.

    A sink has no value, so it only scales: with l the log-sum-exp of the keys, out * e^l / (e^l + e^sink), and the
    log-sum-exp becomes log(e^l + e^sink). ``run(sinks=)`` of the wrappers is ignored by their fa2 and fa3 kernels, and
    the wrapper that has sinks has neither soft cap nor masks, and one module name for all head sizes.
    """
    if out.is_cuda:
        from attn_flashinfer.kernels.metadata import launch_fold

        folded = torch.empty_like(lse) if return_lse else None
        launch_fold(out, lse, sinks, folded)
        return folded
    found = lse * LN2
    with_sink = torch.logaddexp(found, sinks.float()[None, :].expand_as(found))
    weight = torch.exp(found - torch.where(with_sink == float("-inf"), 0.0, with_sink))
    out.copy_(torch.where(weight[..., None] > 0, out.float() * weight[..., None], 0.0))
    return with_sink if return_lse else None
