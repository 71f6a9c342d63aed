"""The Triton kernels behind `quantize`: one program for a request and KV head, or two passes of one for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile(q, token, head, q_t, q_h, group, width, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, GROUP)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = q + token.to(tl.int64) * q_t + (head * group + row) * q_h + column
    return tl.load(place, mask=(row < group) & (column < width), other=0.0).to(tl.float32)


@triton.jit
def _store(out, value, token, head, heads, group, width, descale, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, GROUP)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    scaled = tl.minimum(tl.maximum(tl.math.div_rn(value, descale), -448.0), 448.0)
    place = out + (token.to(tl.int64) * heads * group + head * group + row) * width + column
    tl.store(place, scaled.to(tl.float8e4nv), mask=(row < group) & (column < width))


@triton.jit
def _descale(largest):
    return tl.where(largest > 0, tl.math.div_rn(largest, 448.0), 1.0)


@triton.jit
def _uniform(
    q, out, descales, tokens_each, q_t, q_h, group, width, GROUP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    largest = 0.0
    for i in range(tokens_each):
        value = _tile(q, request * tokens_each + i, head, q_t, q_h, group, width, GROUP, WIDTH)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(value), 1), 0))
    descale = _descale(largest)
    tl.store(descales + request * heads + head, descale)
    for i in range(tokens_each):
        token = request * tokens_each + i
        value = _tile(q, token, head, q_t, q_h, group, width, GROUP, WIDTH)
        _store(out, value, token, head, heads, group, width, descale, GROUP, WIDTH)


@triton.jit
def _request_of(starts, token, batch):
    """The last request that begins at or before the token, of those that have tokens; padding is scaled as the last."""
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _largest(
    q, starts, bits, batch, q_t, q_h, group, width, GROUP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    value = _tile(q, token, head, q_t, q_h, group, width, GROUP, WIDTH)
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    largest = tl.where(token < tl.load(starts + batch), largest, 0.0)  # padding has no say
    # of numbers that are not negative, the larger has the larger bits
    place = bits + _request_of(starts, token, batch) * tl.num_programs(1) + head
    tl.atomic_max(place, largest.to(tl.int32, bitcast=True))


@triton.jit
def _scaled(
    q, starts, bits, out, descales, batch, q_t, q_h, group, width, GROUP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    place = _request_of(starts, token, batch) * heads + head
    descale = _descale(tl.load(bits + place).to(tl.float32, bitcast=True))
    tl.store(descales + place, descale)  # every token of a request stores the same
    value = _tile(q, token, head, q_t, q_h, group, width, GROUP, WIDTH)
    _store(out, value, token, head, heads, group, width, descale, GROUP, WIDTH)


def launch_quantize(
    q: Tensor, num_kv_heads: int, batch_size: int, query_start_loc: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(q in e4m3, descale [B, Hkv]), as `queries.Quantized` has them."""
    tokens, heads, width = q.shape
    group = heads // num_kv_heads
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    tile = {"GROUP": triton.next_power_of_2(group), "WIDTH": triton.next_power_of_2(width), "num_warps": 4}
    sizes = (*q.stride()[:2], group, width)
    if query_start_loc is None:
        descale = torch.empty(batch_size, num_kv_heads, device=q.device)
        _uniform[(batch_size, num_kv_heads)](q, out, descale, tokens // batch_size, *sizes, **tile)
        return out, descale
    # a request without tokens keeps 0
    bits, descale = torch.zeros(2, batch_size, num_kv_heads, device=q.device)
    bits = bits.view(torch.int32)
    _largest[(tokens, num_kv_heads)](q, query_start_loc, bits, batch_size, *sizes, **tile)
    _scaled[(tokens, num_kv_heads)](q, query_start_loc, bits, out, descale, batch_size, *sizes, **tile)
    return out, descale
