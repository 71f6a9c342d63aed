"""What a run of the kit is to do, in its order, and how much of it was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from attn_core.errors import UsageError
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System
from attn_core.testing.axes import TIERS, Tier
from attn_core.testing.cases import Case
from attn_core.testing.extras import extra_cases
from attn_core.testing.fuzz import EXAMPLES, Share, shares
from attn_core.testing.generation import generate_cases, ladder_cases, most_telling_first, spread
from attn_core.testing.refusals import refusal_cases
from attn_core.testing.workers import Job

#: The parts of a run that are no tier.
REFUSALS: Final = "refusals"
PROBES: Final = "probes"
FUZZ: Final = "fuzz"
_REQUIRED: Final = "required"


class Done(NamedTuple):
    """How many cases of a part ran, and of how many."""

    ran: int
    of: int


@dataclass(frozen=True, slots=True)
class Agenda:
    """The cases of a run, each with its part (a tier, or refusals), and the shares of fuzzing.

    ``required``: the cases without which nothing is proved, each declared thing alone. ``last``: those that come after
    all others of their tier.
    """

    parts: Mapping[Case, str]
    shares: Sequence[Share] = ()
    required: frozenset[Case] = frozenset()
    last: frozenset[Case] = frozenset()

    @property
    def cases(self) -> list[Case]:
        return list(self.parts)

    @property
    def size(self) -> int:
        """How many cases there are, those of the fuzzing among them."""
        return len(self.parts) + sum(share.examples for share in self.shares)

    def jobs(self) -> Iterator[Job]:
        """What is required, then tier by tier, the refusals after the first one; the fuzzing among the last tier's.

        In each of these what shows most comes first: a run may end before its cases do.
        """
        by_part: dict[str, list[Case]] = {}
        last: dict[str, list[Case]] = {}
        for case, part in self.parts.items():
            of = last if case in self.last else by_part
            of.setdefault(_REQUIRED if case in self.required else part, []).append(case)
        for part in (_REQUIRED, TIERS[0], REFUSALS, PROBES, *TIERS[1:-1]):
            yield from most_telling_first(by_part.get(part, []))
            yield from last.get(part, [])
        yield from _merged(most_telling_first(by_part.get(TIERS[-1], [])), self.shares)
        yield from last.get(TIERS[-1], [])

    def done(self, ran: Collection[Case], fuzzed: int) -> dict[str, Done]:
        """How much of each part was done: the cases that ran, and as many as were fuzzed."""
        of = Counter(self.parts.values())
        did = Counter(part for case, part in self.parts.items() if case in ran)
        found = {part: Done(did[part], of[part]) for part in of}
        return found | ({FUZZ: Done(fuzzed, sum(share.examples for share in self.shares))} if self.shares else {})


def _merged(cases: Sequence[Case], every: Sequence[Share]) -> Iterator[Job]:
    """The shares at even distances among the cases."""
    step = len(cases) // len(every) + 1 if every else len(cases) + 1
    left = list(every)
    for i, case in enumerate(cases):
        if left and i % step == 0:
            yield left.pop(0)
        yield case
    yield from left


def agenda(
    manifest: Manifest,
    tier: Tier,
    system: System,
    seed: int = 0,
    *,
    select: str = "",
    max_cases: int | None = None,
    examples: int = EXAMPLES,
    emulated: bool = False,
) -> Agenda:
    """The cases of a tier and of those before it, the refusals, and in the last tier ``examples`` of fuzzing.

    select: only cases with this text in their id, and no fuzzing. max_cases: a spread of at most so many positive
    cases, without those that a tier has besides its ladders and covering arrays. emulated: without those that need a
    device's memory. Raises UsageError if no case is left.
    """
    positive: dict[Case, str] = {}
    for part in TIERS[: TIERS.index(tier) + 1]:
        for case in generate_cases(manifest, part, system, seed):
            if select in case.id:
                positive.setdefault(case, part)
    chosen = spread(list(positive), max_cases)
    extras = {} if len(chosen) < len(positive) else _extras(manifest, tier, system, seed, select, emulated)
    extras = {case: part for case, part in extras.items() if case not in positive}
    refused = [case for case in refusal_cases(manifest, tier, system, seed) if select in case.id]
    if not chosen and not extras and not refused:
        raise UsageError(f"no case has {select!r} in its id", given=select, hint="leave select out")
    parts = {case: positive[case] for case in chosen} | extras | dict.fromkeys(refused, REFUSALS)
    fuzzes = tier == TIERS[-1] and not select
    alone = frozenset(ladder_cases(manifest, TIERS[0], system, seed)) & parts.keys()
    return Agenda(parts, shares(seed, examples) if fuzzes else (), alone, frozenset(extras))


def _extras(manifest: Manifest, tier: Tier, system: System, seed: int, select: str, emulated: bool) -> dict[Case, str]:
    """The extra cases of a tier and of those before it."""
    found: dict[Case, str] = {}
    for part in TIERS[: TIERS.index(tier) + 1]:
        for case in extra_cases(manifest, part, system, seed):
            if select in case.id and not (emulated and case.far):
                found.setdefault(case, part)
    return found
