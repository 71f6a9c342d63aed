"""How the command speaks: data on stdout, prose on stderr, tables for people and plain columns for pipes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

Row = Sequence[str]


def for_a_person() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def note(text: str) -> None:
    """One line of prose, to stderr."""
    print(text, file=sys.stderr)


def print_json(name: str, payload: Mapping[str, Any]) -> None:
    """``payload`` as JSON under the envelope every document of ours has: schema ``attn/<name>``, version 1."""
    import json  # not needed by --names, and 4 ms

    envelope = {"schema": f"attn/{name}", "version": 1}
    print(json.dumps(envelope | {key: value for key, value in payload.items() if key not in envelope}, indent=2))


def print_table(headers: Row, rows: Sequence[Row], *, title: str | None = None) -> None:
    """A table: drawn by rich for a person (who may set NO_COLOR), columns with two spaces between them otherwise."""
    if for_a_person():
        _print_rich(headers, rows, title)
    else:
        print("\n".join(plain_lines(headers, rows)))


def plain_lines(headers: Row, rows: Sequence[Row]) -> list[str]:
    """The table as aligned lines, the last column unpadded."""
    widths = [max(len(str(line[i])) for line in (headers, *rows)) for i in range(len(headers))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (headers, *rows)
    ]


def _print_rich(headers: Row, rows: Sequence[Row], title: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        longest = max((len(word) for cell in (header, *(row[i] for row in rows)) for word in cell.split()), default=0)
        # Names stay whole, to be copied; other columns break between words where they can.
        table.add_column(header, overflow="fold", no_wrap=i == 0, min_width=min(longest, 20))
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    Console().print(table)


def _style(cell: str) -> str:
    """A colour for the words that carry a verdict; everything else stays as the terminal has it."""
    if cell in ("yes", "ok", "accepted", "proved") or cell.startswith("proved"):
        return "green"
    if cell.startswith(("no:", "broken", "fail", "error")) or cell == "no":
        return "red"
    return "yellow" if cell.startswith(("warn", "claimed", "disabled")) else ""
