"""What `attn list-backends` shows, without click: shells ask for it at every completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from attn_core.cli.output import for_a_person, note, print_json, print_table
from attn_core.planning.discovery import BackendRef, Installed, discover
from attn_core.planning.distributions import scan
from attn_core.planning.filters import CORE_DISTRIBUTION
from attn_core.planning.manifest import HEADLINE, headline
from attn_core.planning.reasons import availability
from attn_core.planning.system import System, detect

FLAGS: Final = frozenset({"--json", "--names", "--strict"})
#: the headline flags where a column has to be narrow
_SHORT: Final = dict(zip(HEADLINE, ("page>1", "spec", "MLA", "window", "media"), strict=True))
#: exit code of --strict where something is broken or ambiguous
BROKEN: Final = 4


def list_backends(flags: Sequence[str]) -> int:
    """Print every installed backend, as ``flags`` (a subset of FLAGS) ask; the exit code."""
    installed = discover()
    for line in installed.notes:
        note(line)
    if "--names" in flags:
        print("\n".join(installed.names))
    else:
        system = detect()
        entries = _entries(installed, system)
        if "--json" in flags:
            print_json("list-backends", {"system": str(system), "backends": entries, "problems": _problems(installed)})
        else:
            _print(entries, installed)
    return BROKEN if "--strict" in flags and _broken(installed) else 0


def core_version() -> str:
    """The version of the core that is installed; ``unknown`` if it runs from a folder that nothing installed."""
    core = scan().get(CORE_DISTRIBUTION)
    return core.version if core else "unknown"


def _broken(installed: Installed) -> bool:
    return any(problem.code != "disabled" for problem in installed.problems) or any(
        r.ambiguous for r in installed.backends
    )


def _entries(installed: Installed, system: System) -> list[dict[str, Any]]:
    from attn_core.testing.proof import best_level, evidence_folders, read_evidence

    runs, problems = read_evidence(evidence_folders(installed.backends))
    for problem in problems:
        note(f"evidence: {problem}")
    return [_entry(ref, system, best_level(runs, ref.name)) for ref in installed.backends]


def _entry(ref: BackendRef, system: System, level: str) -> dict[str, Any]:
    reasons = availability(ref.manifest, system)
    return {
        "name": ref.listed,
        "distribution": ref.dist,
        "version": ref.version,
        "usable": not reasons and not ref.ambiguous,
        "reasons": [each.to_json() for each in reasons],
        "ambiguous": ref.ambiguous,
        "headline": headline(ref.manifest),
        "evidence": level,
        "summary": ref.manifest.summary,
        "object": ref.object,
    }


def _problems(installed: Installed) -> list[dict[str, Any]]:
    return [
        {
            "name": problem.listed,
            "distribution": problem.dist,
            "version": problem.version,
            "code": problem.code,
            "message": problem.message,
            "hint": problem.hint,
        }
        for problem in installed.problems
    ]


def _print(entries: list[dict[str, Any]], installed: Installed) -> None:
    """A row for each entry point. What stands against it is its last column, or lines below the table for a person."""
    headers = ("backend", "distribution", *HEADLINE.values(), "evidence", "usable here")
    rows = [
        (
            entry["name"],
            f"{entry['distribution']} {entry['version']}",
            *("yes" if has else "-" for has in entry["headline"].values()),
            entry["evidence"],
            _usable(entry),
        )
        for entry in entries
    ]
    nothing = "-" * (len(HEADLINE) + 1)
    rows += [(p.listed, f"{p.dist} {p.version}", *nothing, _cause(p.code, p.message)) for p in installed.problems]
    rows.sort()
    if for_a_person():
        print_table(("backend", *_SHORT.values(), "evidence", "usable", "distribution"), [_narrow(row) for row in rows])
        print("\n".join(f"{row[0]}: {row[-1]}" for row in rows if row[-1] != "yes"))
    else:
        print_table(headers, rows)
    for problem in installed.problems:
        if problem.hint and problem.code != "disabled":
            note(f"{problem.listed}: {problem.hint}")


def _narrow(row: Sequence[str]) -> tuple[str, ...]:
    """A row for 80 columns: what may be broken over lines stands last or has spaces, and causes come below."""
    name, dist, *flags, level, usable = row
    return name, *flags, level.replace("-", " ").strip() or "-", usable.partition(":")[0], dist


def _cause(code: str, message: str) -> str:
    return f"{'disabled' if code == 'disabled' else 'broken'}: {message}"


def _usable(entry: dict[str, Any]) -> str:
    if entry["ambiguous"]:
        return "no: the name is claimed twice; use the full one"
    if entry["reasons"]:
        return "no: " + "; ".join(map(in_words, entry["reasons"]))
    return "yes"


def in_words(reason: dict[str, Any]) -> str:
    """What a Reason (as JSON data) says about a machine, short enough for a table."""
    if reason["layer"] != "installed":
        return f"{reason['field']} is {reason['wanted']}, it needs {reason['have']}"
    absent = reason["have"] == "not installed"
    return f"needs {reason['wanted']}, {'not installed' if absent else 'found ' + reason['have']}"
