"""What cases say of each feature: proved, refused, over-claimed, under-claimed, raised, or not run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from attn_core.planning.config import FEATURES, PHASES
from attn_core.planning.manifest import Clause, Manifest
from attn_core.planning.system import System
from attn_core.testing.blame import Blame, claims_of, explain, root_check
from attn_core.testing.cases import Case
from attn_core.testing.run import NOT_BEGUN, NOT_ENDED, Result

Outcome = Literal["proved", "refused", "over_claimed", "under_claimed", "raised", "not_run"]

#: What the table has a row for besides the features of the closed set: row -> what it says.
SHAPES: Final[Mapping[str, str]] = {
    **{phase: f"the phase {phase}" for phase in PHASES},
    "mha": "layers with keys and values for each KV head",
    "mla": "layers over the paged latent",
    "page_size_gt_1": "native pages of more than one token",
    **{f"kv_{name}": f"a cache of {name}" for name in ("fp8_e4m3", "fp8_e5m2")},
}
ROWS: Final[tuple[str, ...]] = (*FEATURES, *SHAPES)
#: The outcomes that contradict the manifest.
FALSE: Final = ("over_claimed", "raised")
#: The note of a row that nothing of the run speaks for.
NO_CASE: Final = "no case of this run"


@dataclass(frozen=True, slots=True)
class Row:
    """One feature: whether it is declared for this machine, and what its cases found.

    ``passed`` and ``failed`` count positive cases of a declared feature, and refusals of one that is not. ``first`` is
    the id of the first case that speaks against the declaration.
    """

    name: str
    declared: bool
    outcome: Outcome
    passed: int = 0
    failed: int = 0
    note: str = ""
    first: str = ""


def rows_of(
    manifest: Manifest,
    system: System,
    results: Sequence[Result],
    *,
    eager_graphs: bool,
    required: Collection[Case] = (),
) -> tuple[tuple[Row, ...], tuple[Blame, ...]]:
    """The rows of the table and why cases failed.

    eager_graphs: nothing was captured, calls were repeated. required: the cases that a run which was cut off must have
    begun; a row that lacks one of its own is not proved.
    """
    blames = tuple(explain(results))
    here = [
        c for c in manifest.clauses if (system.device in c.devices or "any" in c.devices) and c.arch.allows(system.arch)
    ]
    declared = {name for clause in here for name in _declared(clause)}
    blamed = {blame.feature: blame for blame in reversed(blames)}
    rows = [
        _cut(_declared_row(name, results, blamed, blames), results, required)
        if name in declared
        else _undeclared_row(name, results)
        for name in ROWS
    ]
    return tuple(_eager_graphs(row, system) if eager_graphs else row for row in rows), blames


def _cut(row: Row, results: Sequence[Result], required: Collection[Case]) -> Row:
    """What a row may say if some of its cases were not begun."""
    mine = [r for r in results if not r.case.refused and row.name in row_names(r)]
    cut = [r for r in mine if r.note.startswith((NOT_BEGUN, NOT_ENDED))]
    if not cut or row.outcome != "proved":
        return row
    lacking = sum(r.case in required for r in cut)
    notes = [row.note, f"{len(cut)} not begun", f"{lacking} of them required" if lacking else ""]
    return replace(row, outcome="not_run" if lacking else "proved", note="; ".join(filter(None, notes)))


def _eager_graphs(row: Row, system: System) -> Row:
    """What can be said of graphs where there are none: their bookkeeping at most, and on a CPU nothing."""
    if row.name != "cuda_graph" or row.outcome != "proved":
        return row
    note = "nothing was captured: the calls were repeated over the same buffers"
    return replace(row, outcome="not_run" if system.device == "cpu" else row.outcome, note=note)


def _declared(clause: Clause) -> set[str]:
    pages = zip(clause.pages, range(2), strict=False)
    return {
        *clause.features,
        *clause.phases,
        clause.kind,
        *(f"kv_{name}" for name in clause.kv_dtypes),
        *(["page_size_gt_1"] if any(size > 1 for size, _ in pages) else []),
    }


def row_names(result: Result) -> frozenset[str]:
    """The rows that a case speaks for."""
    case = result.case
    names = {*case.features, *case.phases, f"kv_{case.kv_dtype}"}
    names |= {kind.kind for kind in case.kinds if kind.ragged == (case.mode == "ragged")}
    return frozenset(names | ({"page_size_gt_1"} if case.page_size > 1 and case.mode != "ragged" else set()))


def _declared_row(name: str, results: Sequence[Result], blamed: Mapping[str, Blame], blames: Sequence[Blame]) -> Row:
    mine = [r for r in results if not r.case.refused and name in row_names(r)]
    passed = [r for r in mine if r.status == "passed"]
    failed = [r for r in mine if r.status == "failed"]
    skipped = [r for r in mine if r.status == "not_run"]
    if name in blamed:
        blame = blamed[name]
        outcome: Outcome = "raised" if blame.check == "raised" else "over_claimed"
        return Row(name, True, outcome, len(passed), len(failed), blame.check, blame.first.case.id)
    if not passed and failed:
        return Row(name, True, _false(failed), 0, len(failed), "every case fails", failed[0].case.id)
    if not passed:
        return Row(name, True, "not_run", note=skipped[0].note if skipped else NO_CASE)
    if failed:
        # proved if it fails only beside another feature that is over-claimed; not if it fails for its shapes
        others = {blame.feature for blame in blames} & set(ROWS)
        cause = next(b for b in blames if b.claim in claims_of(failed[0]))
        outcome = "proved" if all(others & row_names(r) for r in failed) else _false(failed)
        return Row(name, True, outcome, len(passed), len(failed), f"fails for {cause.feature}", failed[0].case.id)
    return Row(name, True, "proved", len(passed))


def _false(failed: Sequence[Result]) -> Outcome:
    """What a declaration is whose cases failed: if the backend raised in all of them, nobody knows what it computes."""
    return "raised" if all(root_check(result) == "raised" for result in failed) else "over_claimed"


def _undeclared_row(name: str, results: Sequence[Result]) -> Row:
    mine = [r for r in results if r.case.refused and r.status != "not_run" and name in refused_for(r)]
    failed = [r for r in mine if r.status == "failed"]
    works = [r for r in mine if r.works_undeclared]
    if failed:
        return Row(name, False, "over_claimed", len(mine) - len(failed), len(failed), "not refused", failed[0].case.id)
    note = f"{len(works)} of {len(mine)} refused cases work when asked all the same" if works else ""
    if works and len(works) == len(mine):
        return Row(name, False, "under_claimed", len(mine), 0, note, works[0].case.id)
    return Row(name, False, "refused" if mine else "not_run", len(mine), 0, note)


def refused_for(result: Result) -> frozenset[str]:
    """The rows that a refusal speaks for: what the case has and the clause lacks."""
    case = result.case
    by_code: dict[str, set[str]] = {
        "feature_unsupported": {*case.features},
        "phase_unsupported": {*case.phases},
        "kv_dtype_unsupported": {f"kv_{case.kv_dtype}"},
    }
    return frozenset(by_code.get(case.refused, ()))
