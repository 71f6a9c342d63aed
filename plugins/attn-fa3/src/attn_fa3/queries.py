"""Queries in e4m3, for a cache in e4m3: the kernels want both in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """q [T, Hq, D] in e4m3 and descale [B, Hkv] fp32: their product is the query, to 4 significant bits."""

    q: Tensor
    descale: Tensor


def quantize(q: Tensor, num_kv_heads: int, batch_size: int, query_start_loc: Tensor | None) -> Quantized:
    """Each request and KV head in a scale of its own, its largest value at the end of e4m3's range.

    q [T, Hq, D]; query_start_loc [B + 1] int32, or None if all requests have T / B tokens. The device is not read.
    """
    if q.is_cuda:
        from attn_fa3.kernels.quantize import launch_quantize

        return Quantized(*launch_quantize(q, num_kv_heads, batch_size, query_start_loc))
    tokens, heads, width = q.shape
    rows = q.float().view(tokens, num_kv_heads, heads // num_kv_heads * width)
    largest = rows.abs().amax(-1)
    if query_start_loc is None:
        request = torch.arange(tokens, device=q.device) // (tokens // batch_size)
    else:
        request = torch.searchsorted(
            query_start_loc[1:], torch.arange(tokens, device=q.device, dtype=torch.int32), right=True
        )
        request = request.clamp(max=batch_size - 1)
        largest[int(query_start_loc[-1]) :] = 0  # rows of padding, after the last request, have no say in its scale
    scale = largest.new_zeros(batch_size, num_kv_heads)
    scale.scatter_reduce_(0, request[:, None].expand(-1, num_kv_heads), largest, "amax")
    descale = torch.where(scale > 0, scale / _LARGEST, 1.0)
    quantized = (rows / descale[request][:, :, None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return Quantized(quantized.view(tokens, heads, width), descale)
