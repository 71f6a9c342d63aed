"""`attn warmup`: lets a backend compile or load what a model will need, so that no serving process waits for it."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from attn_core.cli.output import note
from attn_core.cli.params import BACKEND, MODEL, serving_options
from attn_core.errors import UsageError
from attn_core.planning.system import System


@click.command()
@click.argument("name", type=BACKEND)
@click.option("--model", type=MODEL, required=True, help="A preset, a config.json, or the folder of a model.")
@click.option("--arch", metavar="CHIP", help="A chip that need not be here: sm_90, gfx942. [default: this machine's]")
@serving_options
@click.option("--cuda-graph", is_flag=True, help="Decode and verify are replayed as graphs.")
def command(name: str, model: str, arch: str | None, **serving: Any) -> None:
    """Compile or load ahead what the backend NAME needs for a model."""
    from attn_core.planning.discovery import discover
    from attn_core.planning.plan import plan
    from attn_core.planning.presets import config_for
    from attn_core.planning.system import FORCE_VARIABLE, detect

    if arch is not None:
        # What the backend compiles for is the system it sees, so it must see this one too.
        os.environ[FORCE_VARIABLE] = _system(arch)
    config = config_for(model, **{key: value for key, value in serving.items() if value is not None})
    ref = discover().find(name)
    phases = {phase: ref.listed for phase in config.phases if phase in ref.manifest.phases}
    made = plan(config, phases or ref.listed, system=detect())

    from attn_core.runtime.build import build
    from attn_core.runtime.kv_cache import KVCache

    device = "cpu" if made.system.forced else {"rocm": "cuda"}.get(made.system.device, made.system.device)
    backend = build(made, KVCache.allocate(made.config, num_pages=2, device=device))
    start = time.monotonic()
    backend.warmup(made.config)
    note(f"{ref.listed} is warm for {model} on {made.system}: {time.monotonic() - start:.1f} s")


def _system(arch: str) -> str:
    """The system that the chip ``arch`` is of. Raises UsageError for a chip of nobody."""
    for device in ("cuda", "rocm", "npu"):
        try:
            return str(System.parse(f"{device}:{arch}"))
        except UsageError:
            continue
    raise UsageError(f"chip {arch!r} is not known", given=arch, accepted="such as sm_90, gfx942, ascend910b")
