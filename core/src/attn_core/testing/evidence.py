"""What a run leaves behind: ``<folder>/<device>/<backend>.json``, the source of the published matrix."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attn_core.planning.discovery import BackendRef
from attn_core.planning.distributions import scan
from attn_core.testing.devices import Place
from attn_core.testing.fingerprint import code_hashes, kit_hash
from attn_core.testing.proof import EVIDENCE_SCHEMA, EVIDENCE_VERSION
from attn_core.testing.report import Report


def facts(ref: BackendRef, place: Place) -> dict[str, Any]:
    """Who was tested, where, and the versions of everything that took part; of one version, two states of the code."""
    return {
        "distribution": {"name": ref.dist, "version": ref.version},
        "device": {"name": place.name, "system": place.system.device},
        "versions": {**versions(ref), **place.versions},
        "code": code_hashes(ref),
        "kit": kit_hash(),
    }


def versions(ref: BackendRef) -> dict[str, str]:
    """Python, torch, the core, the plugin, and every distribution that its manifest requires."""
    import torch

    dists = {d.name: d.version for d in scan(None).values()}
    wanted = ["attn-core", ref.dist, *(name for r in ref.manifest.requires_dists for name in r.found(dists))]
    found = {name: dists[name] for name in dict.fromkeys(wanted) if name in dists}
    return {"python": platform.python_version(), **found, "torch": torch.__version__, **_of_cuda()}


def _of_cuda() -> dict[str, str]:
    """What torch was built for, and what the driver speaks; nothing without a device."""
    import torch

    if not torch.cuda.is_available() or not torch.version.cuda:
        return {}
    driver = _cuda_driver()
    return {"cuda": torch.version.cuda} | ({"cuda driver": driver} if driver else {})


def _cuda_driver() -> str | None:
    """The CUDA version that the driver speaks; asked of the driver: torch has no name for it in every build.

    None where there is no driver's library under its usual name, as with AMD's.
    """
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def to_json(report: Report) -> dict[str, Any]:
    """The evidence of a run as JSON data: outcomes and counts, not the list of cases."""
    return {
        "schema": EVIDENCE_SCHEMA,
        "version": EVIDENCE_VERSION,
        "backend": report.backend,
        **report.facts,
        "level": report.level,
        "date": datetime.now(UTC).date().isoformat(),
        "tiers": list(report.whole_tiers),
        "done": {part: {"ran": done.ran, "of": done.of} for part, done in report.done.items()},
        "seed": report.seed,
        "duration_s": round(report.seconds, 1),
        "cases": {name: report.count(name) for name in ("passed", "failed", "not_run")},
        "not_run": report.not_run,
        "features": {
            row.name: {"outcome": row.outcome, "passed": row.passed, "failed": row.failed, "note": row.note}
            for row in report.rows
        },
        "failures": [{"claim": b.claim, "check": b.check, "case": b.first.case.id} for b in report.blames],
    }


def write_evidence(folder: str | Path, data: Mapping[str, Any]) -> Path:
    """Writes ``folder/<device>/<backend>.json``, whole or not at all, and gives its path."""
    path = Path(folder) / slug(data["device"]["name"]) / f"{data['backend']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as stream:
        json.dump(data, stream, indent=1)
        stream.write("\n")
    os.replace(stream.name, path)
    path.chmod(0o644)
    return path


def slug(name: str) -> str:
    """A device's name as a folder's: lower case, with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
