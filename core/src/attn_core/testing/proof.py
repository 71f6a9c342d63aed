"""What the conformance kit found, as files: the evidence of runs, read without torch and without the kit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from attn_core.errors import CheckFailedError, UsageError
from attn_core.planning.discovery import BackendRef

#: Folder of evidence to read in place of the one that ships with the core.
EVIDENCE_VARIABLE: Final = "ATTN_EVIDENCE"
EVIDENCE_SCHEMA: Final = "attn/evidence"
EVIDENCE_VERSION: Final = 1

_ANEW: Final = "write it anew: attn verify NAME --evidence DIR"

#: How a claim was proved, the strongest first; levels are never mixed in one cell.
LEVELS: Final = ("silicon", "isa-emulated", "contract-emulated", "compiled", "schema", "declared")
#: The levels at which something was computed and compared: only these prove a claim.
PROVING: Final = LEVELS[:3]


#: The code that a run has proved beside what is installed here; `unknown` where either has no hash.
Standing = Literal["same", "edited", "unknown"]


def _standing(recorded: str, installed: str) -> Standing:
    if not (recorded and installed):
        return "unknown"
    return "same" if recorded == installed else "edited"


class Evidence(NamedTuple):
    """What one run of the kit found: which backend, where, how, when, and the outcome of each feature.

    tiers: those of the kit that ran whole. code, kit: hashes of the backend's own code and of the kit, empty in runs
    that recorded none.
    """

    backend: str
    dist: str
    version: str
    device: str
    level: str
    date: str
    outcomes: Mapping[str, str]
    source: str
    tiers: tuple[str, ...] = ()
    code: str = ""
    standing: Standing = "unknown"
    kit: str = ""
    judged_by: Standing = "unknown"

    @property
    def reach(self) -> str:
        """How far the run went, of the levels that compute: the largest tier that ran whole, each has those before."""
        if self.level not in PROVING:
            return ""
        return f"to {self.tiers[-1]}" if len(self.tiers) > 1 else "".join(self.tiers) or "contract in part"

    def beside(self, installed: str, kit: str = "") -> Evidence:
        """The same run, compared with the code and the kit that are installed: hashes, or empty."""
        return self._replace(standing=_standing(self.code, installed), judged_by=_standing(self.kit, kit))

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str) -> Evidence:
        """From the JSON of ``evidence/<device>/<backend>.json``. Raises CheckFailedError for anything else."""
        if data.get("schema") != EVIDENCE_SCHEMA or data.get("version") != EVIDENCE_VERSION:
            raise CheckFailedError(
                f"{source} is {data.get('schema')!r} version {data.get('version')!r}",
                accepted=f"{EVIDENCE_SCHEMA} version {EVIDENCE_VERSION}",
                hint=_ANEW,
            )
        try:
            return cls(
                backend=data["backend"],
                dist=data["distribution"]["name"],
                version=data["distribution"]["version"],
                device=data["device"]["name"],
                level=LEVELS[LEVELS.index(data["level"])],
                date=data["date"],
                outcomes={name: entry["outcome"] for name, entry in data["features"].items()},
                source=source,
                tiers=tuple(map(str, data.get("tiers", ()))),
                code=str(data.get("code", {}).get(data["distribution"]["name"], "")),
                kit=str(data.get("kit", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckFailedError(
                f"{source} lacks or misstates {error}", hint="write it anew: attn verify NAME --evidence DIR"
            ) from error


def evidence_folders(refs: Iterable[BackendRef] = ()) -> list[str]:
    """Where evidence lies: what ATTN_EVIDENCE names, or the core's own; and what a plugin ships beside its manifest.

    Raises UsageError if the variable names what is no folder; empty, it means none.
    """
    chosen = os.environ.get(EVIDENCE_VARIABLE)
    if chosen and not os.path.isdir(chosen):
        raise UsageError(f"{EVIDENCE_VARIABLE} is {chosen!r}", given=chosen, accepted="a folder of evidence")
    core = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    checkout = os.path.join(core, "..", "..", "..", "evidence")
    own = (
        [chosen] if chosen is not None else [checkout] if os.path.isdir(checkout) else [os.path.join(core, "evidence")]
    )
    shipped = (os.path.join(os.path.dirname(ref.location), "evidence") for ref in refs if ref.location)
    return [folder for folder in dict.fromkeys(map(os.path.normpath, (*own, *shipped))) if os.path.isdir(folder)]


def read_evidence(folders: Iterable[str]) -> tuple[list[Evidence], list[str]]:
    """Every run in ``<folder>/<device>/<backend>.json``, by backend, the strongest level and the newest first.

    Beside them: what is wrong with the files that are no evidence.
    """
    found, problems = [], []
    for path in (path for folder in folders for path in _files(folder)):
        try:
            found.append(Evidence.parse(_load(path), path))
        except CheckFailedError as error:
            problems.append(str(error))
    found.sort(key=lambda run: run.date, reverse=True)
    return sorted(found, key=lambda run: (run.backend, LEVELS.index(run.level))), problems


def _files(folder: str) -> Iterator[str]:
    for device in sorted(os.listdir(folder)):
        inner = os.path.join(folder, device)
        if os.path.isdir(inner):
            yield from (os.path.join(inner, name) for name in sorted(os.listdir(inner)) if name.endswith(".json"))


def _load(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            data = json.load(stream)
    except (OSError, ValueError) as error:
        raise CheckFailedError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckFailedError(f"{path} is no JSON object")
    return data


def best_level(runs: Iterable[Evidence], backend: str) -> str:
    """The strongest level at which anything of ``backend`` was proved; ``declared`` if nothing was."""
    levels = {run.level for run in runs if run.backend == backend and "proved" in run.outcomes.values()}
    return next((level for level in LEVELS if level in levels), "declared")
