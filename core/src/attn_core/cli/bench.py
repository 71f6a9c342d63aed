"""`attn bench`: installed backends timed and checked on the named shapes, as a table or a result file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from attn_core.cli.output import note, print_json, print_table
from attn_core.cli.params import BACKEND
from attn_core.errors import UsageError, nearest

if TYPE_CHECKING:
    from attn_core.bench.shapes import Shape


@click.command()
@click.argument("names", type=BACKEND, nargs=-1, required=True, metavar="NAME...")
@click.option("--shape", "wanted", multiple=True, help="A shape by its name; may be given again.")
@click.option("--device", help="cpu or cuda. [default: this machine's]")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of queries and output.")
@click.option("--kv-cache-dtype", default="auto", show_default=True, help="Of the cache.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.01), default=0.5, show_default=True, help="Timing of each shape."
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result file.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/bench.")
def command(
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    device: str | None,
    dtype: str,
    kv_cache_dtype: str,
    seconds: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Time the backends NAME... on named shapes on this device, each checked against the fp64 oracle."""
    from attn_core.bench.run import measure, results
    from attn_core.bench.shapes import CPU_SHAPES, SHAPES
    from attn_core.errors import PlanError
    from attn_core.planning.system import detect
    from attn_core.runtime.threads import set_threads

    set_threads()
    system = detect()
    device = device or ("cuda" if system.device == "rocm" else system.device)
    _check_here(device)
    shapes: dict[str, Shape] = {**SHAPES, **CPU_SHAPES}
    chosen = [_shape(name, shapes) for name in wanted] or list((CPU_SHAPES if device == "cpu" else SHAPES).values())
    rows = []
    for shape in chosen:
        for name in names:
            try:
                rows.append(
                    measure(name, shape, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype, seconds=seconds)
                )
            except PlanError as error:
                note(f"{shape.name}: {error.message}")
    found = results(rows, system)
    if output:
        note(f"written to {found.write(output)}")
    if as_json:
        from dataclasses import asdict

        payload = {"device": found.device, "versions": dict(found.versions), "rows": [asdict(r) for r in rows]}
        print_json("bench", payload)
        return
    cells = [
        (r.shape, r.impl, f"{r.ms:.3f}", _number(r.gbs, ".1f"), _number(r.tflops, ".2f"), _number(r.err, ".1e"))
        for r in rows
    ]
    print_table(("shape", "impl", "ms", "GB/s", "TFLOP/s", "error"), cells)


def _check_here(device: str) -> None:
    """Raise UsageError for a device that torch has not here, or one that is emulated."""
    from attn_core.testing.devices import at

    if device.startswith("emulated:"):
        raise UsageError(
            f"device {device!r}: the time of an emulator says nothing of the hardware", accepted="a device that is here"
        )
    with at(device):
        pass


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _shape(name: str, shapes: dict[str, Shape]) -> Shape:
    if name not in shapes:
        near = nearest(name, shapes)
        hint = f"did you mean {near!r}?" if near else None
        raise UsageError(f"there is no shape {name!r}", given=name, accepted=shapes, hint=hint)
    return shapes[name]
