"""CPU kernels of the fused infer attention operator, versions 1 and 2: every rule checked, then computed in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from attn_ascend.emulator.call import Call, call_of, check_tensors
from attn_ascend.emulator.maths import attention, sight
from attn_ascend.emulator.requests import check_requests, key_counts, query_counts, requests_of
from attn_ascend.emulator.rules import need

_PAGED_TOKEN_WIDTHS: Final = ((128, 128),)
_GIVEN_TOKEN_WIDTHS: Final = ((128, 128), (192, 192), (192, 128))
_LATENT: Final = 512
_ROTARY: Final = 64

Kernel = Callable[..., Any]


def fused_attention(version: int) -> Kernel:
    """The functional form: -> (attention, lse or a tensor of no elements)."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        call = call_of(version, query, key, value, arguments)
        check(call)
        out, lse = compute(call)
        return out, lse if call.lse else torch.empty(0)

    return kernel


def fused_attention_out(version: int) -> Kernel:
    """The form that fills tensors it is given."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        workspace: Tensor | None = None,
        out: Sequence[Tensor],
        **arguments: Any,
    ) -> tuple[Tensor, Tensor]:
        call = call_of(version, query, key, value, arguments)
        check(call)
        need(not call.lse, "out_lse", "an LSE asked of the .out form")
        result, _ = compute(call)
        given = [tuple(t.shape) for t in out]
        form = (
            len(out) == 2 and out[0].shape == result.shape and out[0].dtype == result.dtype and out[0].is_contiguous()
        )
        need(form, "out_form", f"out {given} for {tuple(result.shape)} {result.dtype}")
        out[0].copy_(result)
        return out[0], out[1]

    return kernel


def workspace(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """A buffer; its size means nothing here."""
    return query.new_empty(1)


def check(call: Call) -> None:
    """Raise ContractViolationError of the first rule that the call breaks."""
    check_tensors(call)
    _check_axes(call)
    check_requests(call)
    if call.query_rope is not None or call.key_rope is not None:
        _check_latent(call)
    else:
        _check_widths(call)
    if not call.single:
        _check_sight(call)


def compute(call: Call) -> tuple[Tensor, Tensor]:
    """attention in the query's dtype and shape (values' width), lse [T, N, 1] or [B, N, S, 1] fp32."""
    outs, lses = [], []
    for request in requests_of(call):
        n, m = request.q.shape[0], request.k.shape[0]
        seen = None if call.single else sight(call.mode, call.pre_tokens, call.next_tokens, n, m)
        out, lse = attention(request.q, request.k, request.v, call.scale, seen, call.sink)
        outs.append(out.to(call.query.dtype))
        lses.append(lse)
    if call.tokens:
        return torch.cat(outs), torch.cat(lses).unsqueeze(-1)
    return torch.stack(outs), torch.stack(lses).transpose(1, 2).unsqueeze(-1).contiguous()


def _check_axes(call: Call) -> None:
    shapes = f"query {tuple(call.query.shape)}, key {tuple(call.key.shape)}, value {tuple(call.value.shape)}"
    axes = 3 if call.tokens else 4
    need(call.query.dim() == axes and call.query.shape[-2] == call.heads, "shape", shapes)
    if call.paged:
        need(call.key.dim() == 3, "cache_form", shapes)
        need(call.key.shape[-1] % call.kv_heads == 0 and call.value.shape[-1] % call.kv_heads == 0, "shape", shapes)
    else:
        need(call.key.dim() == call.value.dim() == axes, "shape", shapes)
        need(call.key.shape[-2] == call.value.shape[-2] == call.kv_heads, "shape", shapes)
        need(call.tokens or call.key.shape[0] == call.query.shape[0], "shape", shapes)
    need(call.key_width == call.width, "shape", shapes)
    need(call.key.shape[:-1] == call.value.shape[:-1], "equal_kv", shapes)
    split = call.tokens and not call.paged and (call.key_width, call.value_width) == (192, 128)
    need(call.key_width == call.value_width or split, "equal_kv", shapes)


def _check_widths(call: Call) -> None:
    widths = (call.width, call.value_width)
    if call.tokens:
        known = _PAGED_TOKEN_WIDTHS if call.paged else _GIVEN_TOKEN_WIDTHS
        need(widths in known, "head_dim_tokens", f"heads of {widths} in TND {'pages' if call.paged else ''}")
        return
    need(call.width % 16 == 0 and call.width <= 512, "head_dim_rows", f"heads of {widths}")
    need(call.single or call.heads * call.width < 65535, "row_width", f"{call.heads} heads of {call.width}")


def _check_latent(call: Call) -> None:
    rope, key_rope = call.query_rope, call.key_rope
    need(rope is not None and key_rope is not None, "rope_pair", "one rotary part alone")
    assert rope is not None
    assert key_rope is not None
    shaped = rope.shape == (*call.query.shape[:-1], _ROTARY) and key_rope.shape == (*call.key.shape[:-1], _ROTARY)
    need(
        shaped and call.width == _LATENT,
        "rope_pair",
        f"latent {call.width}, rope {tuple(rope.shape)}, {tuple(key_rope.shape)}",
    )
    powers = (32, 64, 128) if call.version == 1 else (1, 2, 4, 8, 16, 32, 64, 128)
    need(
        call.kv_heads == 1 and call.heads in powers,
        "rope_heads",
        f"{call.heads} query heads, {call.kv_heads} key heads",
    )
    need(call.version == 2 or not call.tokens, "rope_layout", f"version {call.version} in {call.layout}")
    need(call.paged and call.block_size in (16, 128), "rope_pages", f"block_size {call.block_size}")
    need(max(query_counts(call), default=0) <= 16, "rope_queries", f"queries {query_counts(call)}")
    need(call.value.data_ptr() == call.key.data_ptr(), "rope_value", "value is another tensor than key")
    need(not call.lse, "rope_lse", "an LSE")
    several = call.mode == 3 and min((n for n in query_counts(call) if n), default=2) > 1
    need(call.mode == 0 if call.single else several, "rope_mode", f"mode {call.mode}, queries {query_counts(call)}")


def _check_sight(call: Call) -> None:
    for n, m in zip(query_counts(call), key_counts(call), strict=True):
        if call.mode == 3:
            need(n <= m, "causal_lengths", f"{n} queries, {m} keys")
        if call.mode == 4:
            pre, after = call.pre_tokens, call.next_tokens
            need(pre >= -n and after >= -m and pre + after >= 0, "band", f"pre_tokens {pre}, next_tokens {after}")
