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
    """Verify ``name``: evidence to ``out``/evidence, counts and failures to ``out``/verify-NAME-TIER.json.

    The latter is there while it runs as well, with those so far.
    """
    begun = time.monotonic()
    failures: list[dict[str, object]] = []
    so_far: Counter[str] = Counter()
    summary_file = out / f"verify-{name}-{tier}.json"

    def progress(done: int, total: int, result: Result) -> None:
        so_far[result.status] += 1
        if result.status == "failed":
            failures.append({"case": result.case.id, "faults": [str(fault)[:500] for fault in result.faults[:3]]})
            if len(failures) <= 12:
                print(f"[{name}] FAILED {result.case.id}\n    {str(result.faults[0])[:400]}", flush=True)
        if done % 200 == 0 or done == total:
            unfinished = {"backend": name, "tier": tier, "unfinished": f"{done} of {total}", "counts": so_far}
            summary_file.write_text(json.dumps({**unfinished, "failures": failures}, indent=1))
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
    summary_file.write_text(json.dumps(summary, indent=1))
    print(f"[{name}] {tier}: {dict(counts)} in {time.monotonic() - begun:.0f} s; not run: {dict(notes)}", flush=True)
    return report
