"""`attn doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import click

from attn_core.cli import checkup
from attn_core.cli.output import print_json, print_table
from attn_core.planning.discovery import discover
from attn_core.planning.hooks import DoctorCheck
from attn_core.planning.system import detect


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="Seconds each plugin may take to load.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/doctor.")
def command(timeout: float, as_json: bool) -> int:
    """Check the machine, torch, drivers and versions, and load each plugin in a process of its own with a time limit.

    Exits with 1 if a check failed.
    """
    checks = run_checks(timeout)
    if as_json:
        print_json("doctor", {"checks": [asdict(check) for check in checks]})
    else:
        print_table(
            ("check", "status", "found", "what to do"), [(c.name, c.status, c.detail, c.hint or "") for c in checks]
        )
    return 1 if any(check.status == "fail" for check in checks) else 0


def run_checks(timeout: float) -> list[DoctorCheck]:
    """Every check, in the order in which causes come before effects."""
    installed, system = discover(), detect()
    return [
        *checkup.machine_checks(system),
        checkup.torch_check(system, timeout),
        *checkup.version_checks(installed),
        *checkup.plugin_checks(installed, system, timeout),
        *checkup.hook_checks(timeout),
        *(DoctorCheck("environment", "warn", line) for line in installed.notes),
        *checkup.advice(installed, system),
    ]
