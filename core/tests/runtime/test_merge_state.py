"""Attention over two disjoint key sets, joined by LSE, is attention over their union."""

from __future__ import annotations

import pytest
import torch
from attn_core.runtime.merge_state import merge_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [T, H, S], values [S, D] -> out [T, H, D], lse [T, H]."""
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@settings(deadline=None)
@given(first=st.integers(1, 9), second=st.integers(1, 9), size=st.floats(0.1, 60.0), seed=st.integers(0, 99))
def test_the_join_is_exact(first: int, second: int, size: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = size * torch.randn(3, 2, first + second, generator=rng)
    values = torch.randn(first + second, 5, generator=rng)
    out, lse = merge_state(
        attention(scores[..., :first], values[:first]), attention(scores[..., first:], values[first:])
    )
    wanted, wanted_lse = attention(scores.double(), values.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_an_empty_set_adds_nothing_whatever_its_out_holds(order: int) -> None:
    full = torch.randn(2, 3, 4), torch.randn(2, 3)
    empty = torch.full((2, 3, 4), float("nan")), torch.full((2, 3), float("-inf"))
    out, lse = merge_state(*(full, empty)[::order])
    assert torch.equal(out, full[0])
    assert torch.equal(lse, full[1])


def test_two_empty_sets_are_empty() -> None:
    empty = torch.full((2, 3, 4), float("nan")), torch.full((2, 3), float("-inf"))
    out, lse = merge_state(empty, empty)
    assert not out.any()
    assert torch.equal(lse, empty[1])


def test_the_dtype_of_the_first_out_stays() -> None:
    state = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3)
    out, lse = merge_state(state, state)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, state[0])
