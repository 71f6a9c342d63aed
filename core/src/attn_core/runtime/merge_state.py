"""Joining attention over disjoint sets of keys, exactly, by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_state(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over the union of two disjoint key sets.

    out [T, Hq, Dv], lse [T, Hq] natural log, fp32; a set without keys has lse -inf and adds nothing, whatever its out
    holds. Both empty: out 0, lse -inf. With m = max(l1, l2): out = (e^(l1-m) o1 + e^(l2-m) o2) / (e^(l1-m) + e^(l2-m))
    (Milakov and Gimelshein 2018, online normaliser; Ye et al. 2025, FlashInfer, section 2.2).
    """
    (out1, lse1), (out2, lse2) = first, second
    top = torch.maximum(lse1, lse2)
    empty = top == float("-inf")
    top = top.masked_fill(empty, 0.0)
    weight1, weight2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = (weight1 + weight2).masked_fill(empty, 1.0)
    part1 = _weighted(out1, weight1 / total)
    part2 = _weighted(out2, weight2 / total)
    lse = torch.where(empty, float("-inf"), top + torch.log(total))
    return (part1 + part2).to(out1.dtype), lse


def _weighted(out: Tensor, weight: Tensor) -> Tensor:
    """out [T, H, D] times weight [T, H] in fp32; weight 0 gives 0 even for NaN."""
    return torch.where(weight[..., None] > 0, out.float() * weight[..., None], 0.0)
