"""Runs the conformance kit on one backend: writes its evidence, and each failure with the case that reproduces it."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from attn_core.testing.report import Report
from attn_core.testing.run import Result
from attn_core.testing.runner import verify


def run_verify(
    name: str,
    tier: str,
    out: Path,
    workers: int,
    select: str = "",
    max_cases: int | None = None,
    max_seconds: float | None = None,
) -> Report:
    """Verify ``name``; counts and failures go to ``out``/verify-NAME-TIER.json, evidence to ``out``/evidence."""
    begun = time.monotonic()
    failures: list[dict[str, object]] = []

    def progress(done: int, total: int, result: Result) -> None:
        if result.status == "failed":
            failures.append({"case": result.case.id, "faults": [str(fault)[:500] for fault in result.faults[:3]]})
            if len(failures) <= 12:
                print(f"[{name}] FAILED {result.case.id}\n    {str(result.faults[0])[:400]}", flush=True)
        if done % 200 == 0 or done == total:
            print(
                f"[{name}] {tier} {done}/{total}, {len(failures)} failed, {time.monotonic() - begun:.0f} s", flush=True
            )

    whole = not select and max_cases is None
    report = verify(
        name, tier, "cuda", workers=workers, select=select, max_cases=max_cases, max_seconds=max_seconds,
        progress=progress, evidence_dir=out / "evidence" if whole else None,
    )  # fmt: skip
    counts = Counter(result.status for result in report.results)
    notes = Counter(result.note for result in report.results if result.status == "not_run")
    slow = sorted(report.results, key=lambda r: -r.seconds)[:5]
    summary = {
        "backend": name,
        "tier": tier,
        "counts": counts,
        "done": {part: list(done) for part, done in report.done.items()},
        "not_run": notes,
        "seconds": time.monotonic() - begun,
        "slowest": [(r.case.id, r.seconds) for r in slow],
        "failures": failures,
    }
    (out / f"verify-{name}-{tier}.json").write_text(json.dumps(summary, indent=1))
    print(f"[{name}] {tier}: {dict(counts)} in {time.monotonic() - begun:.0f} s; not run: {dict(notes)}", flush=True)
    return report
