"""The Triton kernels behind `quantize`: the largest value of each part of a step, then every row scaled by them all.

Two launches and no memory that must be zero before: each program of the second reads all of what the first found.
Compiled once for each number of heads, whatever the batch: so a warm-up compiles what every step needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_mla.queries import LARGEST, MAX_EXPONENT

_HEADS = 8
#: Parts that the first kernel cuts a step into, at least a token each.
_PARTS = 1024
_LARGEST = tl.constexpr(LARGEST)
_MAX_EXPONENT = tl.constexpr(MAX_EXPONENT)
_NAN = tl.constexpr(0x7F)


@triton.jit
def _rows(q, token, first, heads, width, q_t, q_h, q_d, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    head = first + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = q + token.to(tl.int64) * q_t + head * q_h + column * q_d
    return tl.load(place, mask=(head < heads) & (column < width), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens_each", "heads_each", "tables_b"])
def _largest(
    q, tables, found, tokens_each, heads, heads_each, width, q_t, q_h, q_d, tables_b,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    part = tl.program_id(1)
    largest = 0.0
    if tl.load(tables + (token // tokens_each).to(tl.int64) * tables_b) != 0:
        for first in range(part * heads_each, tl.minimum(heads, (part + 1) * heads_each), HEADS):
            value = tl.abs(_rows(q, token, first, heads, width, q_t, q_h, q_d, HEADS, WIDTH))
            value = tl.where(value < float("inf"), value, 0.0)  # a NaN is not less than anything
            largest = tl.maximum(largest, tl.max(tl.max(value, 1), 0))
    tl.store(found + token * tl.num_programs(1) + part, largest)


@triton.jit(do_not_specialize=["count"])
def _scaled(
    q, found, count, out, scale, factor, heads, width, q_t, q_h, q_d,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    value = _rows(q, token, first, heads, width, q_t, q_h, q_d, HEADS, WIDTH)
    largest = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(found + place, mask=place < count, other=0.0))
    ratio = tl.maximum(tl.math.div_rn(tl.max(largest, 0), _LARGEST), 1.0)
    bits = ratio.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)  # of the next power of two
    exponent = tl.minimum(exponent, _MAX_EXPONENT)
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    if (token == 0) & (first == 0):
        tl.store(scale, power * factor)
    scaled = value * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    bits = tl.where(tl.abs(scaled) <= _LARGEST, scaled, 0.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = tl.where(tl.abs(scaled) <= _LARGEST, bits, _NAN)
    head = first + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = out + (token.to(tl.int64) * heads + head) * width + column
    tl.store(place, bits.to(tl.uint8), mask=(head < heads) & (column < width))


def launch_quantize(q: Tensor, page_table: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """(q in e4m3, scale [1]), as `queries.quantize` has them."""
    tokens, heads, width = q.shape
    blocks = triton.cdiv(heads, _HEADS)
    parts = min(blocks, max(1, _PARTS // tokens))
    heads_each = triton.cdiv(blocks, parts) * _HEADS
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    found = torch.empty(tokens * parts + 1, dtype=torch.float32, device=q.device)
    scale = found[-1:]
    tile = {"HEADS": _HEADS, "WIDTH": triton.next_power_of_2(width), "num_warps": 4}
    sizes = (width, *q.stride())
    each = tokens // page_table.shape[0]
    _largest[(tokens, parts)](
        q, page_table, found, each, heads, heads_each, *sizes, page_table.stride(0), **tile
    )  # fmt: skip
    _scaled[(tokens, blocks)](
        q, found, tokens * parts, out.view(torch.uint8), scale, factor, heads, *sizes, BLOCK=1024, **tile
    )
    return out, scale
