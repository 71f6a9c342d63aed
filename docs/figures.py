"""Tables of figures in documents, made from the result files of benchmarks: none is typed in by hand.

Between two comments a document says what it shows, and the table is written between them:

    <!-- figures of: FILE: SHAPE; SHAPE, across attn:fa3, fa3 -->     measurements of shapes that begin so
    <!-- rows of: FILE: what=replay: backend, keys, host_us -->       rows with these values, and these columns
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from attn_core.bench.results import Results, Row

ROOT: Final = Path(__file__).parent.parent
FIGURES: Final = re.compile(
    r"(<!-- figures of: (\S+\.json): (.*?)(?:, (only|across) (.*?))? -->).*?(<!-- end of figures -->)", re.DOTALL
)
ROWS: Final = re.compile(r"(<!-- rows of: (\S+\.json): (.*?): (.*?) -->).*?(<!-- end of rows -->)", re.DOTALL)


def with_figures(text: str) -> str:
    """``text`` with its tables of measurements.

    The first row of a shape is what the others are compared with; ``across`` has a column for each implementation in
    its place. Without either every implementation is shown.
    """
    return FIGURES.sub(
        lambda found: (
            f"{found[1]}\n\n"
            f"{_figures(found[2], found[3].split('; '), (found[5] or '').split(', '), across=found[4] == 'across')}\n"
            f"{found[6]}"
        ),
        text,
    )


def with_rows(text: str) -> str:
    """``text`` with its tables of rows: those that have the values named before the columns, each ``name=value``."""
    return ROWS.sub(
        lambda found: f"{found[1]}\n\n{_rows(found[2], found[3].split(', '), found[4].split(', '))}\n{found[5]}", text
    )


def _rows(path: str, wanted: list[str], columns: list[str]) -> str:
    data = json.loads((ROOT / path).read_text(encoding="utf-8"))
    values = [pair.partition("=")[::2] for pair in wanted if pair != "all"]
    rows = [row for row in data["rows"] if all(str(row.get(name)) == value for name, value in values)]
    if not rows:
        raise SystemExit(f"{path} has no rows with {', '.join(wanted)}")
    shown = [tuple(_cell(row.get(name)) for name in columns) for row in rows]
    date = f", {data['date']}" if "date" in data else ""
    named = tuple(name.replace("_", " ") for name in columns)
    return "\n".join([f"{data['device']}{date}: [{Path(path).name}](../{path})\n", *table(named, shown)])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    return "" if value is None else _number(value) if isinstance(value, float) else str(value)


def _figures(path: str, wanted: list[str], impls: list[str], *, across: bool) -> str:
    """The rows whose shapes begin as ``wanted`` says, of every implementation or of those in ``impls``."""
    results = Results.load(ROOT / path)
    rows = [
        row
        for shape in wanted
        for row in results.rows
        if row.shape.startswith(shape) and (impls == [""] or row.impl in impls)
    ]
    missing = [shape for shape in wanted if not any(row.shape.startswith(shape) for row in rows)]
    if missing:
        raise SystemExit(f"{path} has no {', '.join(missing)}")
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = _across(rows, impls) if across else _down(rows)
    return "\n".join([f"{results.device}, {results.date}, {versions}: [{Path(path).name}](../{path})\n", *lines])


def _down(rows: list[Row]) -> Iterator[str]:
    """A row for each measurement, beside the first of its shape."""
    first = {row.shape: row.ms for row in reversed(rows)}
    return table(
        ("shape", "what", "ms", "of the first"),
        [(row.shape, f"`{row.impl}`", _milliseconds(row.ms), f"{row.ms / first[row.shape]:.2f}") for row in rows],
    )


def _across(rows: list[Row], impls: list[str]) -> Iterator[str]:
    """A row for each shape, milliseconds of each implementation across; the first of several of one is shown."""
    found = {(row.shape, row.impl): row.ms for row in reversed(rows)}
    return table(
        ("shape, ms", *(f"`{impl}`" for impl in impls)),
        [
            (shape, *(_milliseconds(found[shape, impl]) if (shape, impl) in found else "-" for impl in impls))
            for shape in dict.fromkeys(row.shape for row in rows)
        ],
    )


def _milliseconds(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 10 else f"{ms:.3f}" if ms >= 1 else f"{ms:.4f}"


def table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(headers) + " |"
    yield "|" + "---|" * len(headers)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""
