"""`attn explain`: the plan for a model, on this machine or on one that is not here, with the whole trace."""

from __future__ import annotations

from typing import Any

import click

from attn_core.cli.output import print_json
from attn_core.cli.params import (
    FALLBACK_HELP,
    MODEL,
    SYSTEM,
    SYSTEMS,
    backend_options,
    chosen_backends,
    serving_options,
)


@click.command()
@click.argument("model", type=MODEL)
@click.option("--system", type=SYSTEM, metavar="SYSTEM", help=f"A machine that need not be here: {SYSTEMS}.")
@backend_options
@serving_options
@click.option("--kv-layout", metavar="LAYOUT", help="NHD, HND or MLA. [default: the plan's choice]")
@click.option(
    "--speculative-num-draft-tokens", type=int, default=0, metavar="N", help="Draft tokens that a verify step checks."
)
@click.option(
    "--speculative-eagle-topk", type=int, default=1, metavar="K", help="Branches of the draft tree; 1 is a chain."
)
@click.option("--cuda-graph", is_flag=True, help="Decode and verify are replayed as graphs.")
@click.option("--without-towers", is_flag=True, help="Without encoders (ragged layers), for engines that run them.")
@click.option("--fallback", type=click.Choice(["warn", "error", "allow"]), default="warn", help=FALLBACK_HELP)
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/plan.")
def command(
    model: str,
    system: str | None,
    attention_backend: str | None,
    prefill_attention_backend: str | None,
    decode_attention_backend: str | None,
    fallback: Any,
    without_towers: bool,
    as_json: bool,
    **serving: Any,
) -> None:
    """Which backend runs each phase of MODEL, why, and why not the others.

    MODEL is a preset, a config.json, or the folder of a model.
    """
    from attn_core.planning.plan import plan
    from attn_core.planning.presets import config_for
    from attn_core.planning.system import detect

    config = config_for(model, **{name: value for name, value in serving.items() if value is not None})
    config = config.without_towers() if without_towers else config
    backends = chosen_backends(attention_backend, prefill_attention_backend, decode_attention_backend)
    made = plan(config, backends, system=detect(system), fallback=fallback)
    if as_json:
        print_json("plan", made.to_json())
    else:
        print(made.explain())
