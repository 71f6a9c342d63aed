"""The Triton kernel behind `join`: one program for a token and a few heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8


@triton.jit
def _join(
    o1, l1, o2, l2, sinks, out, lse,
    o1_t, o1_h, l1_t, l1_h, o2_t, o2_h, l2_t, l2_h, out_t, out_h, lse_t, lse_h,
    num_heads, width,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
    SECOND: tl.constexpr, SINK: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    live = head < num_heads
    tile = live[:, None] & (column < width)[None, :]
    none = -float("inf")

    a = tl.load(l1 + token * l1_t + head * l1_h, mask=live, other=none)
    top = a
    if SECOND:
        b = tl.load(l2 + token * l2_t + head * l2_h, mask=live, other=none)
        top = tl.maximum(top, b)
    if SINK:
        s = tl.load(sinks + head, mask=live, other=none).to(tl.float32)
        top = tl.maximum(top, s)
    top = tl.where(top == none, 0.0, top)

    weight = tl.exp(a - top)
    total = weight
    # a part without keys may hold anything: weight 0 must give 0, for NaN too
    value = tl.load(o1 + token * o1_t + head[:, None] * o1_h + column[None, :], mask=tile, other=0.0).to(tl.float32)
    acc = tl.where(weight[:, None] > 0, value * weight[:, None], 0.0)
    if SECOND:
        weight = tl.exp(b - top)
        total += weight
        value = tl.load(o2 + token * o2_t + head[:, None] * o2_h + column[None, :], mask=tile, other=0.0).to(tl.float32)
        acc += tl.where(weight[:, None] > 0, value * weight[:, None], 0.0)
    if SINK:
        total += tl.exp(s - top)
    safe = tl.where(total > 0, total, 1.0)
    acc = acc / safe[:, None]
    tl.store(out + token * out_t + head[:, None] * out_h + column[None, :], acc.to(out.dtype.element_ty), mask=tile)
    if LSE:
        tl.store(lse + token * lse_t + head * lse_h, tl.where(total > 0, top + tl.log(safe), none), mask=live)


def launch_join(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill ``out`` [T, Hq, Dv] and ``lse`` [T, Hq] from the parts; ``out`` may be the first part."""
    tokens, heads, width = out.shape
    if not tokens:
        return
    o1, l1 = first
    o2, l2 = second if second is not None else first
    written = lse if lse is not None else l1
    _join[(tokens, triton.cdiv(heads, _HEADS))](
        o1, l1, o2, l2, sinks if sinks is not None else l1, out, written,
        *o1.stride()[:2], *l1.stride(), *o2.stride()[:2], *l2.stride(), *out.stride()[:2], *written.stride(),
        heads, width,
        HEADS=_HEADS, WIDTH=triton.next_power_of_2(width),
        SECOND=second is not None, SINK=sinks is not None, LSE=lse is not None, num_warps=4,
    )  # fmt: skip
