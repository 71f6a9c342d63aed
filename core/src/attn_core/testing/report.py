"""What a run of the kit found, for people and for CI: the table, what failed with how to repeat it, and JUnit XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_core.testing.agenda import FUZZ, Done
from attn_core.testing.axes import TIERS, Tier
from attn_core.testing.blame import Blame
from attn_core.testing.rows import FALSE, NO_CASE, Row, refused_for
from attn_core.testing.run import Result


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run. ``facts`` are what evidence says of the machine and the versions."""

    backend: str
    device: str
    level: str
    tier: Tier
    seed: int
    results: tuple[Result, ...]
    rows: tuple[Row, ...]
    blames: tuple[Blame, ...]
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    #: how much ran of each tier, of the refusals, the probes and the fuzzing
    done: Mapping[str, Done] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something ran."""
        return not self.count("failed") and bool(self.count("passed"))

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    def count(self, status: str) -> int:
        """How many cases ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def failures(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == "failed")

    @property
    def whole_tiers(self) -> tuple[str, ...]:
        """The tiers of which everything ran, those before them included; the last one has the fuzzing too."""
        whole = []
        for tier in TIERS[: TIERS.index(self.tier) + 1]:
            parts = (tier, FUZZ) if tier == TIERS[-1] else (tier,)
            if any(self.done[part].ran < self.done[part].of for part in parts if part in self.done):
                break
            whole.append(tier)
        return tuple(whole)

    def table(self) -> str:
        """The features, the counts, and for each explanation of failures the case that reproduces it."""
        lines = [f"{self.backend} on {self.device} ({self.level}), tier {self.tier}, seed {self.seed}", ""]
        heads = ("feature", "declared", "outcome", "cases", "")
        body = [
            (row.name, "yes" if row.declared else "no", row.outcome.replace("_", "-"), _cases(row), row.note)
            for row in self.rows
            if row.note != NO_CASE
        ]
        widths = [max(len(line[i]) for line in (heads, *body)) for i in range(4)]
        for line in (heads, *body):
            cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
            lines.append("  ".join([*cells, line[4]]).rstrip())
        for blames in self._by_feature():
            lines += ["", *_headline(blames)]
            lines.append(f"  attn verify {self.backend} --device {self.device} --case '{blames[0].first.case.id}'")
        return "\n".join([*lines, "", *self._summary(), *self.notes])

    def _by_feature(self) -> list[list[Blame]]:
        """The blames, those of one feature and one check together."""
        found: dict[tuple[str, str], list[Blame]] = {}
        for blame in self.blames:
            found.setdefault((blame.feature, blame.check), []).append(blame)
        return list(found.values())

    def _summary(self) -> list[str]:
        """The counts, and what is false, what did not run, what works undeclared, what was warned of."""
        lines = [
            f"{self.count('passed')} passed, {self.count('failed')} failed, {self.count('not_run')} not run"
            f" in {self.seconds:.1f} s"
        ]
        false = [f"{row.name} ({row.outcome.replace('_', '-')})" for row in self.rows if row.outcome in FALSE]
        lines += [f"false: {', '.join(false)}"] if false else []
        if any(part.ran < part.of for part in self.done.values()):
            lines.append("not all of it ran: " + ", ".join(f"{n} {d.ran} of {d.of}" for n, d in self.done.items()))
        lines += [f"not run, {count}: {note}" for note, count in self.not_run.items()]
        lines += [f"works, and is not declared: {text}" for text in self.undeclared]
        warned = Counter(text for result in self.results for text in result.warnings)
        return lines + [f"warned in {count} cases: {text}" for text, count in warned.items()]

    @property
    def not_run(self) -> dict[str, int]:
        """Why cases did not run, and how many for each reason."""
        return dict(Counter(result.note for result in self.results if result.status == "not_run"))

    @property
    def undeclared(self) -> tuple[str, ...]:
        """What worked though no clause has it, of what the table has no row for: sizes, dtypes, layouts."""
        return tuple(
            f"{r.case.refused.removesuffix('_unsupported')}, as in {r.case.id}"
            for r in self.results
            if r.works_undeclared and not refused_for(r)
        )


def _headline(blames: Sequence[Blame]) -> list[str]:
    """What fails, and how it shows; the claims of one feature in one line."""
    if len(blames) == 1:
        return [str(blames[0]), *(f"  {fault}" for fault in blames[0].first.faults[:3])]
    claims = ", ".join(blame.claim for blame in blames)
    failed, tried = sum(blame.failed for blame in blames), sum(blame.tried for blame in blames)
    line = f"{blames[0].feature} ({claims}): {failed} of {tried} cases fail, first {blames[0].first.case.id}"
    return [line, *(f"  {fault}" for fault in blames[0].first.faults[:3])]


def _cases(row: Row) -> str:
    if not row.passed + row.failed:
        return "-"
    return f"{row.passed} passed" + (f", {row.failed} failed" if row.failed else "")


def junit_xml(report: Report) -> str:
    """The run as JUnit XML: one testcase for each case."""
    suite = ET.Element(
        "testsuite",
        name=f"attn verify {report.backend}",
        tests=str(len(report.results)),
        failures=str(report.count("failed")),
        skipped=str(report.count("not_run")),
        time=f"{report.seconds:.3f}",
    )
    for result in report.results:
        case = ET.SubElement(
            suite, "testcase", classname=f"{report.backend}.{result.case.mode}", name=result.case.id,
            time=f"{result.seconds:.3f}",
        )  # fmt: skip
        if result.status == "failed":
            failure = ET.SubElement(case, "failure", message=str(result.faults[0]))
            failure.text = "\n".join(map(str, result.faults))
        elif result.status == "not_run":
            ET.SubElement(case, "skipped", message=result.note)
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True)
