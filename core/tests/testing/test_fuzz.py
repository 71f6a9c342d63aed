"""Fuzzing: torch_native survives it, a fault is made small, and a search ends when it must."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from attn_core.planning.manifest import Manifest
from attn_core.testing.cases import MEMORIES, MODES, OPTIONS, Case
from attn_core.testing.checks import Fault
from attn_core.testing.claimed import is_claimed
from attn_core.testing.fuzz import EXAMPLES, Share, run_share, shares
from attn_core.testing.liars.scores import WrongScale
from attn_core.testing.run import Result, Target

#: Decodes of one shape: what a case drawn from everything hardly ever is.
NARROW = {
    "schema": 1,
    "name": "narrow",
    "protocol": ">=1.0,<2",
    "summary": "Decodes",
    "requires": {"host_lengths": True},
    "supports": [
        {
            "phases": ["decode", "verify"],
            "device": "any",
            "kind": "mla",
            "dtypes": ["bfloat16"],
            "head_dims": [[576, 512]],
            "page_sizes": [64],
            "features": ["lse", "verify_chain"],
        }
    ],
}


def test_random_cases_are_right_or_refused(target: Target) -> None:
    less = (replace(c, features=c.features - {"softcap", "cross"}) for c in target.ref.manifest.clauses)
    ref = replace(target.ref, manifest=replace(target.ref.manifest, clauses=tuple(less)))
    results = run_share(Share(11, 60), replace(target, ref=ref))
    assert [r.case.id for r in results if r.status != "passed"] == []
    assert len(results) >= 60
    assert 0 < sum(bool(r.case.refused) for r in results) < len(results)


def drawn(manifest: Manifest, count: int, monkeypatch: pytest.MonkeyPatch, target: Target) -> list[Case]:
    """As many random cases, none of which runs."""
    monkeypatch.setattr("attn_core.testing.fuzz.try_one", lambda case, target: Result(case, "passed"))
    own = replace(target, ref=replace(target.ref, manifest=manifest))
    return [result.case for share in shares(0, count) for result in run_share(share, own)]


def test_random_cases_are_of_every_sort(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = drawn(target.ref.manifest, 300, monkeypatch, target)
    assert len({case.id for case in seen}) > 220
    for name, values in {"mode": MODES, "memory": MEMORIES, "layout": ("NHD", "HND", "MLA")}.items():
        counts = Counter(getattr(case, name) for case in seen)
        assert set(counts) == set(values)
        assert min(counts.values()) > len(seen) / len(values) / 4, counts
    # random cases draw from what they drew from when their seeds were first written down: the rest is in `extras`
    assert {option for case in seen for option in case.options} == set(OPTIONS) - {"sinks16"}


def test_most_random_cases_are_within_what_is_claimed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of narrow means: drawn from everything, hardly a case would be its own."""
    narrow = Manifest.parse(NARROW)
    seen = drawn(narrow, 150, monkeypatch, target)
    claimed = [case for case in seen if is_claimed(narrow, case, target.system)]
    assert len(seen) / 2 < len(claimed) < len(seen)
    assert {case.mode for case in claimed} == {"decode", "verify"}
    assert not any("nohost" in case.options for case in seen)


def test_shares_make_up_the_whole_and_differ() -> None:
    parts = shares(0)
    assert sum(share.examples for share in parts) == EXAMPLES
    assert len({share.seed for share in [*parts, *shares(1)]}) == 2 * len(parts)
    assert [share.examples for share in shares(0, 120)] == [100, 20]


def test_a_failure_is_made_small_and_can_be_repeated(target: Target) -> None:
    liar = replace(target, ref=replace(target.ref, cls=WrongScale))
    *before, smallest = run_share(Share(1, 60), liar)
    assert smallest.status == "failed"
    assert all(r.status == "passed" for r in before)
    small = smallest.case
    assert len(small.requests) == 1
    assert len(small.kinds) <= 2
    assert Case.parse(small.id) == small


def test_a_search_ends_with_its_time(target: Target) -> None:
    assert run_share(Share(0, 50), target, deadline=time.time() - 1) == ()


def test_nothing_is_made_smaller_on_a_device_that_is_lost(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Case] = []

    def crash(case: Case, target: Target) -> Result:
        tried.append(case)
        return Result(case, "failed", (Fault("raised", "CUDA error: an illegal memory access"),))

    monkeypatch.setattr("attn_core.testing.fuzz.try_one", crash)
    (result,) = run_share(Share(0, 50), target, is_lost=lambda result: True)
    assert tried == [result.case]
