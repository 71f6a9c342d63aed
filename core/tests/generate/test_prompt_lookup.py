"""Guesses are what followed the last tokens where they stood before."""

from __future__ import annotations

import pytest
from attn_core.generate.prompt_lookup import guess


@pytest.mark.parametrize(
    ("tokens", "count", "guessed"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 9, [4, 1, 2, 3]),
        ([9, 2, 3, 4, 1, 2, 3], 1, [4]),
        ([5, 3, 6, 4, 3, 8, 1, 3], 1, [8]),
        ([1, 2, 3], 2, []),
        ([4], 2, []),
        ([], 2, []),
        ([6, 6], 2, [6]),
    ],
    ids=["a run of three", "to the end", "a run of two", "the latest place", "nothing", "one", "none", "itself"],
)
def test_guess(tokens: list[int], count: int, guessed: list[int]) -> None:
    assert guess(tokens, count) == guessed


def test_a_longer_run_wins_over_a_later_place() -> None:
    assert guess([1, 2, 3, 70, 9, 3, 80, 1, 2, 3], 1) == [70]
