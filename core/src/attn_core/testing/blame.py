"""Which claim explains the failures: spectrum-based fault localisation over the claims of the cases.

A claim explains well if the cases that have it fail (precision) and the failures have it (recall). The claim with the
best harmonic mean of both is named, the failures it accounts for are set aside, and so on. Names that are broader are
preferred where they explain as well: `sliding_window` before `sliding_window in decode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from attn_core.planning.config import FEATURES
from attn_core.testing.run import Result

#: Which fault of a case counts, if it has several: the one that would cause the others.
_PRIORITY: Final = (
    "witness", "refused", "raised", "inputs", "foreign_write", "cache_write", "form", "output", "lse",
    "isolation", "deterministic", "batch_invariant", "cuda_graph", "not_refused",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Blame:
    """``claim`` accounts for ``failed`` of the ``tried`` cases that have it, all by the same ``check``."""

    check: str
    claim: str
    failed: int
    tried: int
    first: Result

    @property
    def feature(self) -> str:
        """The claim without the mode, or the check itself where it is one: what a table has a row for."""
        bare = self.claim.partition(" in ")[0]
        return self.check if bare == "attention" and self.check != "output" else bare

    def __str__(self) -> str:
        what = self.claim if self.check in ("output", "raised", "refused") else f"{self.check} ({self.claim})"
        return f"{what}: {self.failed} of {self.tried} cases fail, first {self.first.case.id}"


def root_check(result: Result) -> str:
    """The check of the fault that would cause the others."""
    return min((fault.check for fault in result.faults), key=_PRIORITY.index)


def explain(results: Iterable[Result]) -> list[Blame]:
    """The fewest claims that account for every failed case, each with the check that failed."""
    ran = [result for result in results if result.status != "not_run"]
    blames = []
    for check in _PRIORITY:
        failed = [r for r in ran if r.status == "failed" and root_check(r) == check]
        universe = [r for r in ran if _has_check(r, check) and (r.status == "passed" or r in failed)]
        blames += _explain_check(check, failed, universe)
    return blames


def _has_check(result: Result, check: str) -> bool:
    """Whether a case can fail this check."""
    needs = {"lse": "lse", "deterministic": "twice", "batch_invariant": "alone", "cuda_graph": "graph"}
    if (check == "not_refused") != bool(result.case.refused):
        return False
    return check not in needs or needs[check] in result.case.options


def _explain_check(check: str, failed: Sequence[Result], universe: Sequence[Result]) -> list[Blame]:
    blames = []
    left = list(failed)
    while left:
        candidates = {claim for result in left for claim in _claims(result)}
        best = max(candidates, key=lambda claim: _score(claim, left, universe))
        explained = [r for r in left if best in _claims(r)]
        tried = sum(best in _claims(r) for r in universe)
        blames.append(Blame(check, best, len(explained), tried, explained[0]))
        left = [r for r in left if best not in _claims(r)]
        universe = [r for r in universe if r not in explained]
    return blames


def _claims(result: Result) -> frozenset[str]:
    claims = result.case.claims()
    return claims | {f"{claim} in {result.case.mode}" for claim in claims}


def _score(claim: str, failed: Sequence[Result], universe: Sequence[Result]) -> tuple[float, bool, bool, int, str]:
    """F1 of "has the claim" as a predictor of failure; then broad names, features, plain names and fewer letters."""
    having = [r for r in universe if claim in _claims(r)]
    hits = sum(claim in _claims(r) for r in failed)
    f1 = round(2 * hits / (len(having) + len(failed)), 3)
    return f1, " in " not in claim, claim in FEATURES or claim == "attention", -len(claim), claim
