"""`attn matrix`: the support matrix rendered, written into the documents that carry it, and checked there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import click

from attn_core.cli.output import note, print_json
from attn_core.errors import CheckFailedError, UsageError
from attn_core.planning.discovery import discover
from attn_core.planning.filters import CORE_DISTRIBUTION
from attn_core.testing.matrix import Row, matrix, to_html, to_json, to_markdown
from attn_core.testing.proof import evidence_folders, read_evidence

#: Between these two lines a document carries the matrix; what is there is ours.
BEGIN: Final = "<!-- attn matrix: begin (rendered by `attn matrix --write`; do not edit) -->"
END: Final = "<!-- attn matrix: end -->"
#: The documents that carry it, below the folder the command runs in.
DOCUMENTS: Final = ("README.md", "docs/matrix.md")


@click.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["md", "html", "json"]),
    default="md",
    show_default=True,
    help="What to print.",
)
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of evidence. [default: what ships]",
)
@click.option("--write", is_flag=True, help="Write it into README.md and docs/matrix.md, between their markers.")
@click.option("--check", is_flag=True, help="Exit with 1 if those documents carry another matrix.")
def command(form: str, evidence: Path | None, write: bool, check: bool) -> None:
    """The support matrix: what manifests claim, and at which level the conformance kit proved it."""
    if write or check:
        _documents(to_markdown(current(evidence, workspace_distributions())), write)
        return
    rows = current(evidence)
    if form == "json":
        print_json("matrix", to_json(rows))
    else:
        render: Callable[[Iterable[Row]], str] = to_html if form == "html" else to_markdown
        print(render(rows))


def current(evidence: Path | None = None, distributions: set[str] | None = None) -> list[Row]:
    """The matrix of what is installed, or of ``distributions`` alone.

    Raises CheckFailedError for a file that should be evidence and is not.
    """
    refs = [ref for ref in discover().backends if distributions is None or ref.dist in distributions]
    runs, problems = read_evidence([str(evidence)] if evidence else evidence_folders(refs))
    if problems:
        raise CheckFailedError("there are files among the evidence that are none", trace=problems)
    return matrix(refs, runs)


def workspace_distributions() -> set[str]:
    """The distributions of the workspace we run in: its documents are about these, whatever else is installed."""
    return {CORE_DISTRIBUTION, *(path.parent.name for path in Path("plugins").glob("*/pyproject.toml"))}


def _documents(text: str, write: bool) -> None:
    present = [Path(name) for name in DOCUMENTS if Path(name).is_file()]
    if not present:
        raise UsageError(f"neither of {', '.join(DOCUMENTS)} is here", hint="run it at the root of the workspace")
    stale = []
    for path in present:
        old = path.read_text(encoding="utf-8")
        new = _between_markers(path, old, text)
        if new == old:
            continue
        if not write:
            stale.append(str(path))
        else:
            path.write_text(new, encoding="utf-8")
            note(f"{path}: written")
    if stale:
        raise CheckFailedError(
            f"the matrix is out of date in {', '.join(stale)}", hint="attn matrix --write, or make docs"
        )


def _between_markers(path: Path, document: str, text: str) -> str:
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{path} has no place for the matrix", accepted=f"a line {BEGIN!r} and a line {END!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
