"""Tolerances: an honest kernel is inside them, and one forgotten key is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.checks import Output, output_faults
from attn_core.testing.reference import Problem, masked_scores, solve
from attn_core.testing.tolerances import Expected, Precision, expect, stored_error_bound
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(dtype: torch.dtype, n: int, m: int, width: int, heat: float, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(c, h, width, generator=generator) for c, h in ((n, 8), (m, 2), (m, 2)))
    visible = torch.arange(m)[None] <= torch.arange(m - n, m)[:, None]
    rounded = [t.to(dtype).double() for t in (q * heat, k, v)]
    return Problem(slice(0, n), rounded[0], rounded[1], rounded[2], visible)


def kernel(found: Problem, layer: AttentionLayer, dtype: torch.dtype) -> Output:
    """What a fused kernel does: q scaled in its dtype, fp32 softmax, weights relative to the maximum rounded."""
    q = (found.q * layer.scale).to(dtype).double() / layer.scale
    scores = masked_scores(replace(found, q=q), layer).float()
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("hgnm,mhd->hgnd", weights.to(dtype).float(), found.v.float()) / total
    lse = (top + total.log())[..., 0].flatten(0, 1).transpose(0, 1)
    return Output(out.permute(2, 0, 1, 3).flatten(1, 2).to(dtype), lse)


def expected(found: Problem, layer: AttentionLayer, dtype: torch.dtype) -> Expected:
    return expect(iter([found]), found.q, layer, Precision.of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    ("n", "m", "width", "heat"), [(1, 1, 16, 1.0), (4, 17, 64, 1.0), (9, 300, 128, 4.0), (2, 900, 8, 1.0)]
)
def test_an_honest_kernel_is_inside(
    dtype: torch.dtype, softcap: float, n: int, m: int, width: int, heat: float
) -> None:  # fmt: skip
    layer = AttentionLayer(0, 8, 2, width, width, width**-0.5, softcap=softcap)
    for seed in range(5):
        found = problem(dtype, n, m, width, heat, seed)
        assert output_faults(kernel(found, layer, dtype), expected(found, layer, dtype), "") == []


def test_a_sink_alone_may_go_through_base_two() -> None:
    """As the sink of a row without keys has to: kernels keep sums in base 2, and come back in the end."""
    sinks = torch.linspace(-4, 4, 801).bfloat16().float()
    layer = AttentionLayer(0, 801, 1, 16, 16, 0.25, sinks=sinks)
    none = Problem(slice(0, 1), torch.zeros(1, 801, 16).double(), *(torch.zeros(0, 1, 16).double(),) * 2,
                   torch.zeros(1, 0, dtype=torch.bool))  # fmt: skip
    said = expected(none, layer, torch.float32)
    there = sinks * torch.tensor(math.log2(math.e))
    back = there * torch.tensor(math.log(2))
    assert not torch.equal(back, sinks)
    out = torch.zeros(1, 801, 16)
    assert output_faults(Output(out, back[None]), said, "") == []
    for off in (1 + 3 * 4 * 2.0**-24, 1 - 3 * 4 * 2.0**-24):  # three times what the four roundings may be
        assert output_faults(Output(out, (sinks * off)[None]), said, "") != []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [17, 300])
def test_one_forgotten_key_is_outside(dtype: torch.dtype, m: int) -> None:
    layer = AttentionLayer(0, 8, 2, 64, 64, 64**-0.5)
    found = problem(dtype, 4, m, 64, 1.0, 0)
    visible = found.visible.clone()
    visible[:, m // 2] = False
    out, lse = solve(iter([replace(found, visible=visible)]), found.q, layer)
    faults = output_faults(Output(out.to(dtype), lse.float()), expected(found, layer, dtype), "layer 0")
    assert {fault.check for fault in faults} >= {"output"}


@pytest.mark.parametrize("spoil", [lambda x: x * 1.05, lambda x: x.fill_(float("nan")), lambda x: x.roll(1, 0)])
def test_wrong_outputs_are_outside(spoil) -> None:  # type: ignore[no-untyped-def]
    layer = AttentionLayer(0, 8, 2, 64, 64, 64**-0.5)
    found = problem(torch.bfloat16, 4, 40, 64, 1.0, 0)
    wanted = expected(found, layer, torch.bfloat16)
    assert output_faults(Output(spoil(wanted.out.bfloat16()), None), wanted, "")


def test_quantised_queries_have_a_wider_tolerance_of_their_own() -> None:
    layer = AttentionLayer(0, 8, 2, 64, 64, 64**-0.5)
    found = problem(torch.bfloat16, 4, 40, 64, 1.0, 0)
    coarse = kernel(replace(found, q=found.q.to(torch.float8_e4m3fn).double()), layer, torch.bfloat16)
    assert output_faults(coarse, expected(found, layer, torch.bfloat16), "")
    declared = expect(iter([found]), found.q, layer, Precision.of(torch.bfloat16, quantizes_query=True))
    assert output_faults(coarse, declared, "") == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounding_to_fp8_is_inside_and_the_next_number_is_not(dtype: torch.dtype) -> None:
    values = torch.linspace(-400, 400, 3001, dtype=torch.float64)
    bound = stored_error_bound(values, dtype, torch.float32)
    stored = values.float().to(dtype)
    assert ((stored.double() - values).abs() <= bound).all()
    beyond: Tensor = (values.float() * 1.3).to(dtype).double()
    assert not ((beyond - values).abs() <= bound)[values.abs() > 1].any()
    assert not stored_error_bound(values, torch.bfloat16, torch.bfloat16).any()
