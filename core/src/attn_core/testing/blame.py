"""Which claim explains the failures: spectrum-based fault localisation over the claims of the cases.

A claim explains well if the cases that have it fail (precision) and the failures have it (recall): the harmonic mean of
both ranks, with a bonus for a direct witness: a failed case and a passed one of the same mode that differ in this claim
alone, as the cases of a ladder do. What the best claim accounts for is set aside, and so on. Names that are broader are
preferred where they explain as well: `sliding_window` before `sliding_window in decode`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from attn_core.planning.config import FEATURES
from attn_core.testing.cases import Case
from attn_core.testing.run import Result

#: Which fault of a case counts, if it has several: the one that would cause the others.
_PRIORITY: Final = (
    "witness", "refused", "raised", "inputs", "foreign_write", "cache_write", "form", "output", "lse",
    "isolation", "deterministic", "batch_invariant", "cuda_graph", "not_refused",
)  # fmt: skip

#: What a direct witness adds to a harmonic mean between 0 and 1.
WITNESS_BONUS: Final = 0.3


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
        if bare == "attention" and self.check != "output":
            return self.check
        axis, _, value = bare.partition("=")
        return {"window": "sliding_window", "kv_dtype": f"kv_{value}"}.get(axis, bare)

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
        witnessed = _witnessed(left, [r for r in universe if r.status == "passed"])
        candidates = {claim for result in left for claim in claims_of(result)}
        best = max(candidates, key=lambda claim: _score(claim, left, universe, witnessed))
        explained = [r for r in left if best in claims_of(r)]
        tried = sum(best in claims_of(r) for r in universe)
        blames.append(Blame(check, best, len(explained), tried, explained[0]))
        left = [r for r in left if best not in claims_of(r)]
        universe = [r for r in universe if r not in explained]
    return blames


def claims_of(result: Result) -> frozenset[str]:
    """The claims of a case, each also as a claim about its mode."""
    return _claims_of(result.case)


@lru_cache(maxsize=1 << 15)
def _claims_of(case: Case) -> frozenset[str]:
    claims = case.claims()
    return claims | {f"{claim} in {case.mode}" for claim in claims}


def _witnessed(failed: Sequence[Result], passed: Sequence[Result]) -> frozenset[str]:
    """The claims in which alone a failed case differs from a passed one of its mode.

    ``attention`` is one if the plainest case of a mode fails: then it takes nothing special.
    """
    found = set()
    for mode in {r.case.mode for r in failed}:
        right = [r.case.claims() for r in passed if r.case.mode == mode]
        wrong = [r.case.claims() for r in failed if r.case.mode == mode]
        found |= {claim for a in wrong for b in right if (claim := _only_difference(a, b))}
        if min(map(len, wrong)) < min(map(len, right), default=1 << 20):
            found.add("attention")
    return frozenset(found)


def _only_difference(wrong: frozenset[str], right: frozenset[str]) -> str | None:
    """The one claim that ``wrong`` has and ``right`` has not, or has with another value of its axis."""
    more, less = wrong - right, right - wrong
    if len(more) != 1:
        return None
    (claim,) = more
    axis = claim.partition("=")[0]
    return claim if all("=" in other and other.partition("=")[0] == axis for other in less) else None


def _score(
    claim: str, failed: Sequence[Result], universe: Sequence[Result], witnessed: frozenset[str]
) -> tuple[float, bool, bool, int, str]:
    """F1 of "has the claim" as a predictor of failure, and the bonus; then broad names, features, and short names."""
    having = sum(claim in claims_of(r) for r in universe)
    hits = sum(claim in claims_of(r) for r in failed)
    f1 = 2 * hits / (having + len(failed))
    bare = claim.partition(" in ")[0]
    value = round(f1 + (WITNESS_BONUS if bare in witnessed else 0), 3)
    return value, " in " not in claim, bare in FEATURES or bare == "attention", -len(claim), claim
