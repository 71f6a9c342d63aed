"""Joining partial attention in one kernel: two disjoint key sets, and a sink, into out and log-sum-exp."""

from __future__ import annotations

import torch
from attn_core.runtime.merge_state import merge_state
from torch import Tensor


def join(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
    *,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` over the union of two disjoint key sets and one sink a head.

    Parts are out [T, Hq, Dv] and lse [T, Hq] fp32, natural log, -inf for a row without keys, any strides; sinks [Hq].
    With m the largest exponent: out = sum e^(l_i - m) o_i / (sum e^(l_i - m) + e^(sink - m)), and lse the log of that
    denominator (Milakov and Gimelshein 2018, online normaliser). ``out`` may be the first part itself.
    """
    if not first[0].is_cuda:
        return _join_on_host(first, second, sinks, out)
    from attn_fa3.kernels.join import launch_join

    target = torch.empty_like(first[0]) if out is None else out
    lse = first[1].new_empty(first[0].shape[:2]) if return_lse else None
    launch_join(first, second, sinks, target, lse)
    return target, lse


def _join_on_host(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, sinks: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same from the core's torch operations: a sink is a key set of value 0 and log-sum-exp ``sink``."""
    joined = first if second is None else merge_state(first, second)
    if sinks is not None:
        lse = sinks.float()[None, :].expand_as(joined[1])
        joined = merge_state(joined, (torch.zeros_like(joined[0]), lse))
    return (joined[0] if out is None else out.copy_(joined[0])), joined[1]
