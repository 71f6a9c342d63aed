"""The support matrix: what manifests claim beside what evidence proves, and never a bare tick."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from attn_core.planning.config import FEATURES
from attn_core.planning.discovery import BackendRef
from attn_core.planning.manifest import HEADLINE, headline
from attn_core.testing.fingerprint import installed_code, kit_hash
from attn_core.testing.proof import LEVELS, PROVING, Evidence, Standing

#: Which outcomes of a run stand behind each headline flag; one that was proved is enough.
_HEADLINE_FEATURES: Final[Mapping[str, tuple[str, ...]]] = {
    "page_size_gt_1": ("page_size_gt_1",),
    "spec_decoding": ("verify_chain", "verify_tree"),
    "mla": ("mla",),
    "sliding_window": ("sliding_window",),
    "multimodal": ("bidirectional_spans", "cross", "ragged"),
}

State = Literal["proved", "claimed", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of one feature of one backend: the state, and the runs it rests on, of one level, newest first."""

    state: State
    runs: tuple[Evidence, ...] = ()

    def __str__(self) -> str:
        where = "; ".join(f"{run.device}, {run.date}{_since(run)}{self.doubt(run)}" for run in self.runs)
        return f"{self.state}: {self.runs[0].level}, {where}" if self.runs else self.state

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        names = ("level", "device", "date", "version")
        runs = [
            {
                **{name: getattr(run, name) for name in names},
                "tiers": [*run.tiers],
                "code": run.standing,
                "kit": run.judged_by,
            }
            for run in self.runs
        ]
        return {"state": self.state, "runs": runs}

    def doubt(self, run: Evidence) -> str:
        """What is to be said of a fault that ``run`` found: the fault may have been the kit's, if that was edited."""
        return f" ({_OTHER_KIT[1]})" if self.doubtful(run) else ""

    def doubtful(self, run: Evidence) -> bool:
        return self.state == "failed" and run.judged_by == "edited"


@dataclass(frozen=True, slots=True)
class Row:
    """One backend of the matrix: ``flags`` by headline flag, ``features`` by feature, ``runs`` of whatever level."""

    backend: str
    dist: str
    version: str
    flags: Mapping[str, Cell]
    features: Mapping[str, Cell]
    runs: tuple[Evidence, ...] = ()

    @property
    def ran(self) -> dict[str, tuple[Evidence, ...]]:
        """The runs of each level that has any, the strongest first; silicon is there without any, too."""
        found = {level: tuple(run for run in self.runs if run.level == level) for level in LEVELS}
        return {level: runs for level, runs in found.items() if runs or level == LEVELS[0]}


#: What a run's mark says of the code that it proved, beside the code that is installed here.
_MARKS: Final[Mapping[Standing, tuple[str, str]]] = {
    "same": ("", ""),
    "edited": ("†", "code edited since"),
    "unknown": ("‡", "the run did not record its code"),
}
#: What a run's mark says of the kit that found a fault.
_OTHER_KIT: Final = ("§", "found by a kit that was edited since, and not run with it again")


def _since(run: Evidence) -> str:
    _, words = _MARKS[run.standing]
    return f" ({words})" if words else ""


def matrix(
    refs: Iterable[BackendRef],
    runs: Iterable[Evidence],
    code: Callable[[BackendRef], str] = installed_code,
    kit: Callable[[], str] = kit_hash,
) -> list[Row]:
    """A row for each backend, sorted by its listed name; ``runs`` as `read_evidence` sorts them.

    A cell is `proved` (runs of the kit computed it and found it right), `claimed` (the manifest says so, no run has
    computed it; runs of the levels compiled and schema show that code compiles, or that calls bind), `refused`
    (the manifest does not claim it, so a request for it is refused; with runs, the kit saw that it is) or `failed`
    (a run contradicts the manifest). What the strongest level with anything to say has found is what counts. Each run
    is compared with ``code``, the hash of what is installed, and with ``kit``, the kit's: a proof of other code, and a
    fault that another kit found, are shown as such.
    """
    runs, judge = list(runs), kit()
    return [
        _row(ref, [run.beside(code(ref), judge) for run in runs if run.backend == ref.name and run.dist == ref.dist])
        for ref in refs
    ]


def _row(ref: BackendRef, runs: list[Evidence]) -> Row:
    return Row(
        backend=ref.listed,
        dist=ref.dist,
        version=ref.version,
        flags={flag: _cell(has, _HEADLINE_FEATURES[flag], runs) for flag, has in headline(ref.manifest).items()},
        features={name: _cell(name in ref.manifest.features, (name,), runs) for name in FEATURES},
        runs=tuple(runs),
    )


def _cell(claimed: bool, names: tuple[str, ...], runs: list[Evidence]) -> Cell:
    for level in LEVELS:
        found = [(run, {run.outcomes.get(name) for name in names}) for run in runs if run.level == level]
        failed = tuple(run for run, outcomes in found if outcomes & {"over_claimed", "raised"})
        if failed:
            return Cell("failed", failed)
        if claimed:
            held = tuple(run for run, outcomes in found if "proved" in outcomes)
        else:
            held = tuple(run for run, outcomes in found if outcomes <= {"refused", "under_claimed"})
        if held:
            return Cell("refused" if not claimed else "proved" if level in PROVING else "claimed", held)
    return Cell("claimed" if claimed else "refused")


def to_json(rows: Iterable[Row]) -> dict[str, Any]:
    """The matrix as JSON data, without the envelope."""
    return {
        "backends": [
            {
                "name": row.backend,
                "distribution": row.dist,
                "version": row.version,
                "ran": {level: [run.device for run in runs] for level, runs in row.ran.items()},
                "headline": {name: cell.to_json() for name, cell in row.flags.items()},
                "features": {name: cell.to_json() for name, cell in row.features.items()},
            }
            for row in rows
        ]
    }


def to_markdown(rows: Iterable[Row]) -> str:
    """Two tables, the headline flags and all features, with the runs that the cells rest on as numbered notes."""
    rows = list(rows)
    notes = _Notes()
    flags = _markdown_table(rows, {key: (text, "flags") for key, text in HEADLINE.items()}, notes)
    features = _markdown_table(rows, {name: (f"`{name}`", "features") for name in FEATURES}, notes)
    return "\n\n".join(["### Headline flags", flags, "### Features", features, notes.markdown()])


class _Notes:
    """The runs that cells point to, numbered in the order in which they are first named."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._marks: set[Standing] = set()
        self._doubts = False

    def mark(self, cell: Cell, version: str) -> str:
        """The cell in words, with the number of each run; a run of another version or other code says so."""
        if not cell.runs:
            return cell.state
        marks = (self._mark(run, version) + self._doubt(cell, run) for run in cell.runs)
        return f"{cell.state}, {cell.runs[0].level} {' '.join(marks)}"

    def ran(self, row: Row) -> str:
        """Every level that the backend has run at, with its runs and how much of the kit they were.

        And that it never ran on silicon, if it did not.
        """
        return "; ".join(
            f"{level} {', '.join(f'{self._mark(run, row.version)} {run.reach}'.rstrip() for run in runs)}"
            if runs
            else f"**{level}: never run**"
            for level, runs in row.ran.items()
        )

    def _mark(self, run: Evidence, version: str) -> str:
        number = self._numbers.setdefault((run.level, run.device, run.date), len(self._numbers) + 1)
        if run.version != version:
            return f"[{number}] of {run.version}"
        self._marks.add(run.standing)
        return f"[{number}]{_MARKS[run.standing][0]}"

    def _doubt(self, cell: Cell, run: Evidence) -> str:
        self._doubts |= cell.doubtful(run)
        return _OTHER_KIT[0] if cell.doubtful(run) else ""

    def lines(self) -> list[str]:
        return [f"[{number}] {level}: {device}, {date}" for (level, device, date), number in self._numbers.items()]

    def markdown(self) -> str:
        legend = (
            "*proved*: the conformance kit computed it and found it right, at this level on this device. *claimed*: the"
            " manifest says so, and nothing has computed it; with *compiled* its code compiles, with *schema* its calls"
            " bind. *refused*: not claimed, so a request is refused before anything runs. Behind each run stands the"
            " largest tier of the kit that ran whole: contract, numerics, stress."
        )
        marks = [f"{mark} {words}" for standing, (mark, words) in _MARKS.items() if mark and standing in self._marks]
        marks += [" ".join(_OTHER_KIT)] if self._doubts else []
        return "  \n".join([legend, *self.lines(), *marks])


def _markdown_table(rows: list[Row], columns: Mapping[str, tuple[str, str]], notes: _Notes) -> str:
    """Backends across, what is claimed down: there are few backends and many features."""
    lines = ["| | " + " | ".join(f"`{row.backend}`" for row in rows) + " |", "|---|" + "---|" * len(rows)]
    lines.append("| Has run | " + " | ".join(notes.ran(row) for row in rows) + " |")
    for key, (text, field) in columns.items():
        lines.append(
            f"| {text} | " + " | ".join(notes.mark(getattr(row, field)[key], row.version) for row in rows) + " |"
        )
    return "\n".join(lines)


def to_html(rows: Iterable[Row]) -> str:
    """A page on its own: the same tables; a cell's title has the whole of its proof."""
    import html

    rows = list(rows)
    body = []
    for title, columns in (("Headline flags", dict(HEADLINE)), ("Features", {name: name for name in FEATURES})):
        field = "flags" if columns.keys() == HEADLINE.keys() else "features"
        head = "".join(
            f"<th>{html.escape(row.backend)}<br><small>{html.escape(row.dist)} {html.escape(row.version)}</small></th>"
            for row in rows
        )
        lines = [f"<tr><th>Has run</th>{''.join(_html_runs(row) for row in rows)}</tr>"]
        lines += [
            f"<tr><th>{html.escape(text)}</th>"
            + "".join(_html_cell(getattr(row, field)[key]) for row in rows)
            + "</tr>"
            for key, text in columns.items()
        ]
        body.append(f"<h2>{title}</h2>\n<table>\n<tr><th></th>{head}</tr>\n" + "\n".join(lines) + "\n</table>")
    return _PAGE.format(body="\n".join(body))


def _html_runs(row: Row) -> str:
    import html

    texts = [
        f"{level}: {', '.join(f'{run.device} {run.reach}'.rstrip() + _since(run) for run in runs) or 'never run'}"
        for level, runs in row.ran.items()
    ]
    return f"<td>{'<br>'.join(map(html.escape, texts))}</td>"


def _html_cell(cell: Cell) -> str:
    import html

    runs = (f"{run.level}, {run.device}, {run.date}, {run.version}{_since(run)}{cell.doubt(run)}" for run in cell.runs)
    where = "<br>".join(map(html.escape, runs))
    return f'<td class="{cell.state}">{cell.state}{f"<br><small>{where}</small>" if where else ""}</td>'


_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>attn: the support matrix</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; }}
table {{ border-collapse: collapse; margin-bottom: 2rem; }}
th, td {{ border: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top; }}
.proved {{ background: #2a72; }} .claimed {{ background: #da02; }}
.failed {{ background: #d222; }} .refused {{ color: #888; }}
</style></head><body>
<h1>The support matrix</h1>
<p>Rendered from manifests and from the evidence of the conformance kit. <b>proved</b>: computed and found right, at
this level on this device. <b>claimed</b>: the manifest says so, and nothing has computed it; with <i>compiled</i> its
code compiles, with <i>schema</i> its calls bind. <b>refused</b>: not claimed, so a request is refused.</p>
{body}
</body></html>"""
