"""`attn verify`: the conformance kit on an installed backend, from the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from attn_core.cli.output import note
from attn_core.cli.params import BACKEND
from attn_core.cli.progress import Progress

if TYPE_CHECKING:
    from attn_core.testing.axes import Tier
    from attn_core.testing.run import Result

#: Failures that are printed as they come.
_FAILURES_TOLD: Final = 20
_MINUTE: Final = 60.0
_TIERS: Final = click.Choice(["contract", "numerics", "stress"])


@click.command()
@click.argument("name", type=BACKEND)
@click.option("--tier", type=_TIERS, default="contract", show_default=True, help="How much; each has those before it.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, npu, xpu or emulated:CHIP. [default: this machine's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random tensor.")
@click.option("--case", metavar="ID", help="That one case, by the id that a failure printed.")
@click.option("--select", default="", metavar="TEXT", help="Only the cases with this text in their id.")
@click.option("--max-seconds", type=click.FloatRange(min=0), help="Begin nothing after so long; says what did not run.")
@click.option("--max-failures", type=click.IntRange(min=1), help="Begin nothing after so many cases have failed.")
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write JUnit XML.")
@click.option("--evidence", type=click.Path(path_type=Path, file_okay=False), help="Write DIR/<device>/<backend>.json.")
@click.option("-n", "--workers", type=click.IntRange(min=1), help="Processes. [default: 1, for --case none of its own]")
def command(
    name: str,
    tier: Tier,
    device: str | None,
    seed: int,
    case: str | None,
    select: str,
    junit: Path | None,
    evidence: Path | None,
    max_seconds: float | None,
    max_failures: int | None,
    workers: int | None,
) -> int:
    """Prove what the backend NAME claims: what is declared is right, what is not declared is refused.

    Prints a table of features; exits with 1 if a claim is false. The tier contract takes a minute or a few on a CPU,
    numerics adds larger shapes, stress the largest and random cases: several times as long. -n shares them.
    """
    from attn_core.runtime.threads import set_threads
    from attn_core.testing.runner import verify

    set_threads()
    with Progress() as progress:
        on_case = _Told(name, progress)
        with on_case.said_if_interrupted():
            report = verify(
                name,
                tier,
                device or _own_device(),
                seed=seed,
                case=case,
                select=select,
                junit=junit,
                evidence_dir=evidence,
                max_seconds=max_seconds,
                max_failures=max_failures,
                workers=workers or (0 if case else 1),
                progress=on_case,
            )
    on_case.end()
    print(report.table())
    return report.exit_code


class _Told:
    """Tells of a run while it runs: how far it is, and the first failures."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._failed = self._done = self._total = 0
        self._said = time.monotonic()

    def __call__(self, done: int, total: int, result: Result) -> None:
        self._done, self._total = done, total
        if result.status == "failed":
            self._failed += 1
            if self._failed <= _FAILURES_TOLD:
                self._progress.close()
                note(f"FAILED {result.case.id}\n  {result.faults[0]}")
        self._progress(f"verifying {self._name}", done, total)
        if not sys.stderr.isatty() and time.monotonic() - self._said > _MINUTE:
            self._said = time.monotonic()
            note(f"attn: {done} of {total} cases, {self._failed} failed")

    @contextmanager
    def said_if_interrupted(self) -> Iterator[None]:
        """Ctrl-C in the block passes, after a line that says how far the run was."""
        try:
            yield
        except KeyboardInterrupt:
            self._progress.close()
            how_far = f"{self._done} of {self._total} cases, {self._failed} failed" if self._done else "before any case"
            note(f"interrupted: {how_far}; --max-seconds ends a run with its table")
            raise

    def end(self) -> None:
        """Say how many failures were not told of; the table explains them."""
        if self._failed > _FAILURES_TOLD:
            note(f"and {self._failed - _FAILURES_TOLD} more failures")


def _own_device() -> str:
    """What torch calls the device of this machine, whatever ATTN_FORCE_SYSTEM plans for."""
    from attn_core.planning.system import detect

    device = detect(environ={}).device
    return "cuda" if device == "rocm" else device
