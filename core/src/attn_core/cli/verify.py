"""`attn verify`: the conformance kit on an installed backend, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from attn_core.cli.output import note
from attn_core.cli.params import BACKEND
from attn_core.cli.progress import Progress

if TYPE_CHECKING:
    from attn_core.testing.axes import Tier
    from attn_core.testing.run import Result

_TIERS: Final = click.Choice(["contract", "numerics", "stress"])


@click.command()
@click.argument("name", type=BACKEND)
@click.option("--tier", type=_TIERS, default="contract", show_default=True, help="How much; each has those before it.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, npu, xpu or emulated:CHIP. [default: this machine's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random tensor.")
@click.option("--case", metavar="ID", help="That one case, by the id that a failure printed.")
@click.option("--select", default="", metavar="TEXT", help="Only the cases with this text in their id.")
@click.option("--max-seconds", type=click.FloatRange(min=0), help="Begin nothing after so long; says what did not run.")
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
    workers: int | None,
) -> int:
    """Prove what the backend NAME claims: what is declared is right, what is not declared is refused.

    Prints a table of features; exits with 1 if a claim is false.
    """
    from attn_core.runtime.threads import set_threads
    from attn_core.testing.runner import verify

    set_threads()
    with Progress() as progress:

        def on_case(done: int, total: int, result: Result) -> None:
            if result.status == "failed":
                progress.close()
                note(f"FAILED {result.case.id}\n  {result.faults[0]}")
            progress(f"verifying {name}", done, total)

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
            workers=workers or (0 if case else 1),
            progress=on_case,
        )
    print(report.table())
    return report.exit_code


def _own_device() -> str:
    """What torch calls the device of this machine, whatever ATTN_FORCE_SYSTEM plans for."""
    from attn_core.planning.system import detect

    device = detect(environ={}).device
    return "cuda" if device == "rocm" else device
