"""`attn list-backends` for click: its help, and complaints about other options; the listing is in listing.py."""

from __future__ import annotations

import click

from attn_core.cli import listing


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/list-backends.")
@click.option("--names", is_flag=True, help="Only the names, one a line.")
@click.option("--strict", is_flag=True, help="Exit with 4 if an entry point is broken or a name ambiguous.")
def command(as_json: bool, names: bool, strict: bool) -> int:
    """Every installed backend: its distribution, whether it is usable here and if not the root cause, the five
    headline flags, and how its claims were proved. A broken plugin is a row with its problem."""
    chosen = {"--json": as_json, "--names": names, "--strict": strict}
    return listing.list_backends([flag for flag, on in chosen.items() if on])
