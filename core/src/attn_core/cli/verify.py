"""`attn verify`: the conformance kit on an installed backend, from the command line."""

from __future__ import annotations

from pathlib import Path

import click

from attn_core.cli.params import BACKEND


@click.command()
@click.argument("name", type=BACKEND)
@click.option(
    "--tier",
    type=click.Choice(["contract", "numerics", "stress"]),
    default="contract",
    show_default=True,
    help="How much: minutes more each.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, npu, or emulated:CHIP where a plugin emulates one."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random tensor.")
@click.option("--case", "case_id", metavar="ID", help="One case alone, by the id that a failure printed.")
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Also write JUnit XML.")
@click.option(
    "--evidence", type=click.Path(path_type=Path, file_okay=False), help="Also write DIR/<device>/<backend>.json."
)
@click.option("-n", "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
def command(
    name: str,
    tier: str,
    device: str,
    seed: int,
    case_id: str | None,
    junit: Path | None,
    evidence: Path | None,
    workers: int,
) -> int:
    """Prove what the backend NAME claims: declared is right, undeclared is refused.

    Prints a table of features; exits with 1 if a claim is false.
    """
    raise NotImplementedError
