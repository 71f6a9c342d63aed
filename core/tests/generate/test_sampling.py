"""Greedy, temperature, nucleus, seeds: what is drawn, how often, and what is refused."""

from __future__ import annotations

import pytest
import torch
from attn_core.errors import ConfigError
from attn_core.generate.sampling import Sampler, SamplingParams, nucleus

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def draws(params: SamplingParams, n: int, request_id: int = 0) -> list[int]:
    sampler = Sampler(params, request_id)
    return [sampler.choose(LOGITS) for _ in range(n)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(SamplingParams(temperature=0), 5) == [1] * 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float) -> None:
    n = 4000
    counts = torch.bincount(torch.tensor(draws(SamplingParams(temperature=temperature, seed=1), n)), minlength=4)
    expected = torch.softmax(LOGITS / temperature, -1) * n
    used = expected > 5
    chi_squared = float(((counts - expected) ** 2 / expected)[used].sum())
    assert chi_squared < 16.3  # the 99.9th percentile at three degrees of freedom


def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p() -> None:
    p = torch.tensor([0.1, 0.5, 0.3, 0.1])
    assert torch.equal(nucleus(p, 0.5), torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert torch.equal(nucleus(p, 0.51), torch.tensor([0.0, 0.5, 0.3, 0.0]))
    assert torch.equal(nucleus(p, 1.0), p)


def test_a_tiny_top_p_is_greedy() -> None:
    assert set(draws(SamplingParams(temperature=2.0, top_p=1e-6, seed=3), 50)) == {1}


def test_a_seed_repeats_and_requests_of_one_seed_differ() -> None:
    params = SamplingParams(temperature=2.0, seed=7)
    assert draws(params, 40) == draws(params, 40)
    assert draws(params, 40, request_id=0) != draws(params, 40, request_id=1)


def test_without_a_seed_every_run_draws_anew() -> None:
    params = SamplingParams(temperature=5.0)
    assert draws(params, 60) != draws(params, 60)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1),
     ("seed", -1), ("seed", 2**63)],
)  # fmt: skip
def test_impossible_values_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})
