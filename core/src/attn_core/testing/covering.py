"""Covering arrays: few rows in which every two values of different axes occur together."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]


def covering_rows(
    axes: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True, *, seed: int = 0
) -> list[Row]:
    """Rows with a value for every axis, such that every allowed pair of values stands in some row.

    ``allowed`` is also asked of rows that lack axes, and must refuse one only for what it has. Greedy: each row starts
    from a pair that is still missing and takes, axis by axis, the value that adds most missing pairs (Cohen et al.,
    1997, AETG).
    The same ``seed`` gives the same rows.
    """
    rng = random.Random(seed)
    names = list(axes)
    missing = dict.fromkeys(
        (a, i, b, j)
        for a, b in combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
        if allowed({a: axes[a][i], b: axes[b][j]})
    )
    rows = []
    while missing:
        a, i, b, j = next(iter(missing))
        chosen = _complete({a: i, b: j}, axes, allowed, missing, rng)
        if chosen is None:
            del missing[a, i, b, j]  # each axis for itself allows the pair, all of them together do not
            continue
        rows.append({name: axes[name][k] for name, k in chosen.items()})
        for pair in _pairs(chosen, names):
            missing.pop(pair, None)
    return rows


def _complete(
    start: dict[str, int],
    axes: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool],
    missing: Mapping[tuple[str, int, str, int], None],
    rng: random.Random,
) -> dict[str, int] | None:
    """``start`` with an index for every other axis; None if the constraints leave none."""
    for _ in range(8):
        chosen = dict(start)
        rest = [name for name in axes if name not in start]
        rng.shuffle(rest)
        for name in rest:
            options = [k for k in range(len(axes[name])) if allowed(_values({**chosen, name: k}, axes))]
            if not options:
                break
            gains = [
                (sum(_key(name, k, other, chosen[other], axes) in missing for other in chosen), k) for k in options
            ]
            best = max(gain for gain, _ in gains)
            chosen[name] = rng.choice([k for gain, k in gains if gain == best])
        else:
            return {name: chosen[name] for name in axes}
    return None


def _values(chosen: Mapping[str, int], axes: Mapping[str, Sequence[Any]]) -> Row:
    return {name: axes[name][k] for name, k in chosen.items()}


def _key(name: str, k: int, other: str, j: int, axes: Mapping[str, Sequence[Any]]) -> tuple[str, int, str, int]:
    names = list(axes)
    return (name, k, other, j) if names.index(name) < names.index(other) else (other, j, name, k)


def _pairs(chosen: Mapping[str, int], names: list[str]) -> list[tuple[str, int, str, int]]:
    return [(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2)]
