"""The board of one phase: every candidate exactly once, what was decided about it, and how the phase ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attn_core.errors import FallbackCycleError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.discovery import BackendRef, Installed, Problem
from attn_core.planning.joint import Choice, Joint, common_cache, describe
from attn_core.planning.ranking import preferences
from attn_core.planning.reasons import Decision, Reason, evaluate, reason
from attn_core.planning.system import System

Status = Literal["chosen", "accepted", "refused", "problem", "not_installed"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the trace: how a candidate ended, with the reasons if it was refused.

    chosen: it runs the phase. accepted: it could, ``note`` says why it does not. refused: it cannot here.
    problem: its plugin is broken or left out. not_installed: nothing installed has it.
    """

    listed: str
    dist: str
    version: str
    status: Status
    reasons: tuple[Reason, ...] = ()
    note: str = ""
    decision: Decision | None = None

    def __str__(self) -> str:
        text = "; ".join(map(str, self.reasons)) or self.note
        return f"{self.listed}: {self.status}{': ' if text else ''}{text}"

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON data."""
        return {
            "backend": self.listed,
            "dist": self.dist or None,
            "version": self.version or None,
            "status": self.status,
            "reasons": [r.to_json() for r in self.reasons],
            "note": self.note or None,
            "decision": self.decision.to_json() if self.decision is not None else None,
        }


@dataclass(slots=True)
class Board:
    """What is known of every candidate of one phase while the plan is made."""

    config: AttentionConfig
    phase: Phase
    system: System
    refs: Mapping[str, BackendRef]
    decisions: Mapping[str, Decision]
    others: tuple[Candidate, ...]
    #: What was seen on the way along fallback lists: (name, what became of it).
    walked: list[tuple[str, str]] = field(default_factory=list)

    def decision(self, ref: BackendRef) -> Decision:
        """What was decided about ``ref``."""
        return self.decisions[ref.listed]

    def usable(self) -> list[BackendRef]:
        """What `auto` may choose: accepted, and of a name that is not ambiguous."""
        return [ref for ref in self.refs.values() if self.decision(ref).accepted and not ref.ambiguous]

    def rows(self) -> Iterator[Candidate]:
        """Every candidate before anything is chosen."""
        for ref in self.refs.values():
            decision = self.decision(ref)
            status: Status = "accepted" if decision.accepted else "refused"
            yield Candidate(ref.listed, ref.dist, ref.version, status, decision.reasons, "", decision)
        yield from self.others

    def fallback_lines(self) -> list[str]:
        """What became of each backend of the fallback lists."""
        return [f"{name}: {what}" for name, what in self.walked]

    def trace(self, choices: Sequence[Choice], joint: Joint) -> tuple[Candidate, ...]:
        """Every candidate once: the chosen one, then what could have been, then the rest, each by name."""
        chosen = joint.choices[self.phase]
        places = {choice.ref.listed: i for i, choice in enumerate(choices)}
        rows = [self._ended(row, chosen, places, choices, joint) for row in self.rows()]
        rank = {"chosen": 0, "accepted": 1, "refused": 2, "problem": 3, "not_installed": 4}
        return tuple(sorted(rows, key=lambda row: (rank[row.status], places.get(row.listed, len(rows)), row.listed)))

    def _ended(
        self, row: Candidate, chosen: Choice, places: Mapping[str, int], choices: Sequence[Choice], joint: Joint
    ) -> Candidate:
        if row.listed == chosen.ref.listed:
            return replace(row, status="chosen", note=chosen.why)
        walked = dict(self.walked).get(row.listed, "")
        if row.status != "accepted":
            return replace(row, note=row.note or (f"on the fallback list: {walked}" if walked else ""))
        if self.refs[row.listed].ambiguous and row.listed not in places:
            full = reason(
                "ambiguous", "name", f"several distributions have {self.refs[row.listed].name}", "", "name one in full"
            )
            return replace(row, status="refused", reasons=(full,))
        if row.listed not in places:
            return replace(row, note="not asked for")
        if places[row.listed] > places[chosen.ref.listed]:
            return replace(row, note=f"after {chosen.ref.listed}: {choices[places[row.listed]].why}")
        return self._without_a_cache(row, choices[places[row.listed]], joint)

    def _without_a_cache(self, row: Candidate, choice: Choice, joint: Joint) -> Candidate:
        """It ranks before the chosen one, so it has no cache in common with what the other phases are given."""
        others = {p: c for p, c in joint.choices.items() if p != self.phase}
        for phase, other in others.items():
            if common_cache(self.config, [choice.decision, other.decision]) is None:
                wanted = f"a cache shared with {phase}={other.ref.listed}"
                return replace(row, status="refused", reasons=(
                    reason("no_common_cache", "cache", wanted, f"{describe(choice)}; {describe(other)}"),
                ))  # fmt: skip
        return replace(row, note=f"the phases together rank better with {joint.choices[self.phase].ref.listed}")


def survey(
    config: AttentionConfig,
    phase: Phase,
    system: System,
    installed: Installed,
    build_refusals: Mapping[tuple[str, Phase], Sequence[Reason]],
) -> Board:
    """The board of ``phase``: every installed backend evaluated, every problem, and what is known but not installed."""
    decisions = {}
    for ref in installed.backends:
        decision = evaluate(ref.manifest, config, phase, system)
        dynamic = tuple(build_refusals.get((ref.listed, phase), ()))
        if dynamic and decision.accepted:
            decision = replace(decision, accepted=False, reasons=dynamic, native_page_size=None)
        decisions[ref.listed] = decision
    others = [_of_problem(problem) for problem in installed.problems]
    others += [
        _not_installed(name) for name in sorted(_known(config, phase, system, installed)) if not installed.has(name)
    ]
    return Board(config, phase, system, {ref.listed: ref for ref in installed.backends}, decisions, tuple(others))


def _of_problem(problem: Problem) -> Candidate:
    code = "disabled" if problem.code == "disabled" else "broken_plugin"
    why = reason(code, "plugin", problem.message, "", problem.hint)
    return Candidate(problem.listed, problem.dist, problem.version, "problem", (why,))


def _known(config: AttentionConfig, phase: Phase, system: System, installed: Installed) -> set[str]:
    """Names that the preference table has for this system, and those on the fallback lists of what is installed."""
    entry = preferences().find(config, phase, system)
    listed = {name for ref in installed.backends for name in ref.manifest.fallback.get(phase, ())}
    return listed | set(entry.order if entry is not None else ())


def _not_installed(name: str) -> Candidate:
    dist = preferences().distributions.get(name, "")
    hint = f"pip install {dist}" if dist else None
    return Candidate(
        name,
        dist,
        "",
        "not_installed",
        (reason("not_installed", "plugin", f"no installed distribution has {name}", "", hint),),
    )


def fallback_choices(board: Board, ref: BackendRef, installed: Installed) -> list[Choice]:
    """What the fallback lists, from that of ``ref`` on, lead to and what can run the phase, in their order.

    A backend of a list that itself lacks the phase by design passes it on to its own list. What is not installed,
    broken or refused is noted on the board and passed over.
    Raises FallbackCycleError if a list leads back to a backend that it came from.
    """
    found: dict[str, Choice] = {}

    def walk(current: BackendRef, chain: tuple[str, ...]) -> None:
        for name in current.manifest.fallback.get(board.phase, ()):
            target = _target(board, name, installed)
            if target is None:
                continue
            if target.listed in chain:
                raise FallbackCycleError(
                    f"the fallback lists for {board.phase} go in a circle: {' -> '.join((*chain, target.listed))}",
                    given=ref.listed,
                    hint="one of these manifests must drop the other",
                )
            decision = board.decision(target)
            links = (*chain, target.listed)
            if decision.accepted:
                found.setdefault(target.listed, Choice(target, decision, f"fallback of {ref.listed}", links))
                board.walked.append((target.listed, "can run it"))
            elif board.phase not in target.manifest.phases:
                board.walked.append((target.listed, f"has no {board.phase} either"))
                walk(target, links)
            else:
                board.walked.append((target.listed, str(decision.reasons[0])))

    walk(ref, (ref.listed,))
    return list(found.values())


def _target(board: Board, name: str, installed: Installed) -> BackendRef | None:
    refs = [ref for ref in installed.backends if name in (ref.listed, ref.name, f"{ref.name}@{ref.dist}")]
    if len(refs) == 1 and (not refs[0].ambiguous or "@" in name):
        return refs[0]
    if refs:
        board.walked.append((name, "several distributions claim the name"))
    elif installed.has(name):
        problem = next(p for p in installed.problems if name in (p.listed, p.name, f"{p.name}@{p.dist}"))
        board.walked.append((name, problem.message))
    else:
        dist = preferences().distributions.get(name)
        board.walked.append((name, "not installed" + (f": pip install {dist}" if dist else "")))
    return None
