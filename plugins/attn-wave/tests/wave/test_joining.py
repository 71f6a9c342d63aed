"""The second phase alone: runs are joined exactly, sinks counted, and what was not computed counts for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attn_core.runtime.layer import AttentionLayer
from attn_wave import joining
from attn_wave.attending import Kernels
from attn_wave.emulator.device import Gfx942
from attn_wave.join_variant import JoinVariant, join_variants
from attn_wave.joining import Runs, can_take, join
from attn_wave.variant import MASKED
from torch import Tensor

LOWEST = float("-inf")
TOKENS, KV_HEADS, GROUP = 3, 2, 2
VARIANTS = list(join_variants())


def once(key: object, make: Callable[[], Any]) -> Any:
    return make()


def runs_of(count: int, width: int) -> Runs:
    """Random results; row 0 was computed in the first run alone, row 1 in none, row 2 saw nothing where it was."""
    drawn = torch.Generator().manual_seed(count)
    rows = KV_HEADS * TOKENS * GROUP
    results, lse = torch.randn(count, rows, width, generator=drawn), 20 * torch.randn(count, rows, generator=drawn)
    lse[1:, 0] = lse[:, 1] = LOWEST
    results[1:, 0] = results[:, 1] = float("nan")
    lse[:, 2] = MASKED + 5
    return Runs(results.flatten(0, 1), lse.flatten(), count, TOKENS, KV_HEADS, GROUP)


def layer_of(width: int, sinks: Tensor | None = None) -> AttentionLayer:
    return AttentionLayer(0, KV_HEADS * GROUP, KV_HEADS, width, width, 1.0, sinks=sinks)


def exact(runs: Runs, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp64: out [T, Hq, D] and lse [T, Hq]."""
    lse = runs.lse.view(runs.count, runs.rows).double() * math.log(2)
    lse = torch.where(lse > MASKED / 2 * math.log(2), lse, LOWEST)
    values = torch.where(lse[..., None] > LOWEST, runs.results.view(runs.count, runs.rows, -1), 0.0).double()
    sink = torch.full((KV_HEADS * GROUP,), LOWEST) if sinks is None else sinks
    row_sinks = sink.double().view(KV_HEADS, 1, GROUP).expand(runs.shape).reshape(1, -1)
    whole = torch.cat([lse, row_sinks]).logsumexp(0)
    share = torch.where(whole > LOWEST, lse - whole, LOWEST).exp()
    out = (values * share[..., None]).sum(0).view(*runs.shape, -1).transpose(0, 1).flatten(1, 2)
    return out, whole.view(runs.shape).transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize("variant", VARIANTS, ids=[variant.key for variant in VARIANTS])
def test_runs_are_joined(variant: JoinVariant, count: int, sunk: bool, emulated: Gfx942) -> None:
    runs, kernels = runs_of(count, variant.width), Kernels(torch.device("cpu"))
    sinks = torch.tensor([0.5, LOWEST, -3.0, 9.0]) if sunk else None
    into = torch.full((TOKENS, KV_HEADS * GROUP, variant.width), float("nan"), dtype=getattr(torch, variant.dtype))
    out, lse = join(kernels.get(variant), runs, layer_of(variant.width, sinks), into, once)
    exact_out, exact_lse = exact(runs, sinks)
    assert out is into
    # rounded once, from fp32
    assert (out.double() - exact_out).abs().max() <= torch.finfo(out.dtype).eps * exact_out.abs().max()
    finite = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[finite].double() - exact_lse[finite]).abs().max() < 2e-5


def test_one_head_alone_has_sinks_too(emulated: Gfx942) -> None:
    """A table that is expanded from one number is a view of it, which no kernel can read."""
    lse = torch.tensor([1.0, 2.0, -3.0])
    runs, sinks = Runs(torch.ones(3, 64), lse, 1, 3, 1, 1), torch.tensor([0.5])
    kernel = Kernels(torch.device("cpu")).get(JoinVariant(64, "float16"))
    layer = AttentionLayer(0, 1, 1, 64, 64, 1.0, sinks=sinks)
    out, whole = join(kernel, runs, layer, torch.empty(3, 1, 64, dtype=torch.float16), once)
    natural = lse * math.log(2)
    assert torch.allclose(whole[:, 0], torch.logaddexp(natural, sinks))
    assert torch.allclose(out[:, 0, 0].float(), torch.sigmoid(natural - sinks), atol=1e-3)


def test_a_row_that_saw_nothing_has_its_sink_to_the_bit(emulated: Gfx942) -> None:
    """Not by way of base 2 and back."""
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(5)) / 8
    runs = runs_of(3, 64)
    runs.lse.fill_(LOWEST)
    kernel = Kernels(torch.device("cpu")).get(JoinVariant(64, "float16"))
    out, lse = join(kernel, runs, layer_of(64, sinks), torch.empty(TOKENS, 4, 64, dtype=torch.float16), once)
    assert torch.equal(lse, sinks.expand(TOKENS, 4))
    assert not out.any()


def test_more_rows_than_a_grid_may_have_take_several_launches(
    emulated: Gfx942, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, runs = Kernels(torch.device("cpu")).get(JoinVariant(64, "float16")), runs_of(3, 64)
    into = torch.empty(2, TOKENS, KV_HEADS * GROUP, 64, dtype=torch.float16)
    whole = join(kernel, runs, layer_of(64, torch.arange(4.0)), into[0], once)
    monkeypatch.setattr(joining, "MOST_ROWS", 5)
    parts = join(kernel, runs, layer_of(64, torch.arange(4.0)), into[1], once)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


def test_a_result_goes_where_it_is_wanted_if_its_rows_lie_in_order() -> None:
    q = torch.zeros(1, dtype=torch.float16)
    assert can_take(torch.zeros(3, 4, 64).half(), q)
    assert not can_take(None, q)
    assert not can_take(torch.zeros(3, 4, 64), q)
    assert not can_take(torch.zeros(4, 3, 64).half().transpose(0, 1), q)
    assert not can_take(torch.zeros(3 * 4 * 64 + 1).half()[1:].view(3, 4, 64), q)
