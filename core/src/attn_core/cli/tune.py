"""`attn tune`: measures which backend is fastest for a model on this device, for `auto` to choose by."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from attn_core.cli.output import note, print_json, print_table
from attn_core.cli.params import MODEL, serving_options


@click.command()
@click.argument("model", type=MODEL)
@serving_options
@click.option(
    "--seconds", type=click.FloatRange(min=0.01), default=0.2, show_default=True, help="Timing of each workload."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/tune.")
def command(model: str, seconds: float, as_json: bool, **serving: Any) -> None:
    """Time every backend that can run MODEL's phases here, and file the times: `auto` ranks by them from then on.

    MODEL is a preset, a config.json, or the folder of a model.
    """
    from attn_core.planning.presets import config_for
    from attn_core.runtime.threads import set_threads
    from attn_core.tune import tune

    set_threads()
    config = config_for(model, **{name: value for name, value in serving.items() if value is not None})
    timings = tune(config, seconds=seconds, progress=note)
    if as_json:
        print_json("tune", {"timings": [asdict(timing) for timing in timings]})
    else:
        cells = [(t.shape, t.backend, t.version, f"{t.seconds * 1e6:.1f}") for t in timings]
        print_table(("shape", "backend", "version", "microseconds a layer"), cells)
