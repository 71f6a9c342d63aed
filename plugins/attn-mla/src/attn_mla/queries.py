"""Queries in e4m3, for a latent in e4m3: both libraries want them in one dtype, with one scale for a whole step."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

#: The largest number of e4m3.
LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max
#: The scale of a step is at most 2 to this: small values are then off by at most 2^-4, as values near 1 are anyway.
MAX_EXPONENT: Final = 6


class Quantized(NamedTuple):
    """q [T, Hq, D] in e4m3; scale [1] fp32 on the device, which ``q`` is multiplied with."""

    q: Tensor
    scale: Tensor


def quantize(q: Tensor, page_table: Tensor, factor: float = 1.0) -> Quantized:
    """q [T, Hq, D] over B = ``page_table.shape[0]`` requests of T / B tokens; ``scale`` comes multiplied by ``factor``.

    The scale is 1 while all queries fit in e4m3's +-448, else the next power of two with which they do, at most
    2^`MAX_EXPONENT`: it moves exponents and leaves 4 significant bits, so it rounds no value otherwise than a scale of
    1 but those below 2^-6 times it. So one request hardly changes how another is rounded, and an ordinary one not at
    all. Rows of padding (null pages) and numbers that are not finite have no say in it. What does not fit even so
    becomes NaN, and with it the row's output: never a wrong number.
    """
    if q.is_cuda:
        from attn_mla.kernels.queries import launch_quantize

        return Quantized(*launch_quantize(q, page_table, factor))
    rows = q.float()
    real = (page_table[:, 0] != 0).repeat_interleave(q.shape[0] // page_table.shape[0])
    counted = torch.where(rows.isfinite() & real[:, None, None], rows.abs(), 0.0)
    exponent = torch.ceil(torch.log2((counted.amax() / LARGEST).clamp(min=1.0))).clamp(max=MAX_EXPONENT)
    scaled = rows * torch.exp2(-exponent)
    fits = torch.where(scaled.abs() <= LARGEST, scaled, float("nan"))
    return Quantized(fits.to(torch.float8_e4m3fn), (torch.exp2(exponent) * factor).view(1))
