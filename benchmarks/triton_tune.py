"""Launch parameters of attn-triton measured on this GPU, as entries for plugins/attn-triton/src/attn_triton/
parameters.toml: ``python benchmarks/triton_tune.py --out FOLDER [--classes decode-few,extend] [--seconds 0.05]``.

A class of shapes is tried with every candidate: compiled and checked against the fp64 oracle side by side, then timed
alone. The best is that with the least geometric mean, over the shapes of the class, of its time to the shape's best
time. Everything that was measured is written beside the entries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from attn_core.bench.shapes import SHAPES, Shape
from attn_core.bench.timing import time_graph
from attn_core.planning.plan import plan
from attn_core.planning.system import detect
from attn_triton import parameters
from attn_triton.backend import TritonBackend
from triton_attention import VARIANTS, compiled_and_right, forward_of, header, workload


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """Shapes that share an entry of ``table``, the facts that select it, and what is tried."""

    table: str
    facts: dict[str, Any]
    shapes: tuple[str, ...]
    candidates: tuple[dict[str, Any], ...]
    kv: str = "auto"
    forced: tuple[tuple[str, Any], ...] = ()


def _decode(block_n: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...], per_sm: tuple[int, ...]) -> Any:
    names = ("block_n", "warps", "stages", "per_sm")
    return tuple(dict(zip(names, values, strict=True)) for values in itertools.product(block_n, warps, stages, per_sm))


def _gluon(keys: tuple[int, ...], warps: tuple[int, ...], per_sm: tuple[int, ...]) -> Any:
    """Tiles of the Gluon kernel over an fp8 cache: ``keys`` of each warp; no more warps than have registers."""
    return tuple(
        {"gluon": True, "block_n": n * w, "warps": w, "per_sm": p}
        for n, w, p in itertools.product(keys, warps, per_sm)
        if w * p <= 8
    )


def _extend(*tiles: tuple[int, int, int, int]) -> tuple[dict[str, Any], ...]:
    names = ("block_m", "block_n", "warps", "stages")
    return tuple(
        {**dict(zip(names, tile, strict=True)), "by_head": by_head} for tile in tiles for by_head in (True, False)
    )


_MHA: Final = {"kind": "mha", "item_bytes": 2, "cache_bytes": 2, "max_width": 128}
_MLA: Final = {"kind": "mla", "item_bytes": 2, "cache_bytes": 2, "max_width": 576}
CLASSES: Final[dict[str, ShapeClass]] = {
    "decode-few": ShapeClass(
        "decode", {**_MHA, "load": "few"}, ("decode bs1 kv8192", "decode bs16 kv4096", "decode bs8 kv65536"),
        _decode((64, 128), (4, 8), (2, 3), (1, 2)),
    ),
    "decode-many": ShapeClass(
        "decode", {**_MHA, "load": "many"}, ("decode bs64 kv4096", "decode bs128 kv2048", "decode bs256 kv1024"),
        _decode((64, 128), (4,), (2, 3, 4), (1, 2, 3)),
    ),
    "decode-mixed": ShapeClass(
        "decode", {**_MHA, "load": "mixed"}, ("decode bs64 kv128-32768 log-uniform",),
        _decode((64, 128), (4,), (2, 3), (1, 2, 3)),
    ),
    "decode-fp8": ShapeClass(
        "decode", {**_MHA, "cache_bytes": 1}, ("decode bs64 kv4096", "decode bs128 kv2048", "decode bs8 kv65536"),
        _decode((64, 128), (4, 8), (3, 4), (1, 2, 3)), kv="fp8_e4m3",
    ),
    "decode-fp8-few": ShapeClass(
        "decode", {"kind": "mha", "load": "few"}, ("decode bs1 kv8192", "decode bs16 kv4096"),
        _gluon((16, 32), (2, 4, 8), (1, 2)), kv="fp8_e4m3",
    ),
    "decode-fp8-long": ShapeClass(
        "decode", {"kind": "mha", "load": "long"}, ("decode bs8 kv65536",), _gluon((16, 32), (1, 2, 4), (2, 4, 8)),
        kv="fp8_e4m3",
    ),
    "decode-fp8-many": ShapeClass(
        "decode", {"kind": "mha", "load": "many"}, ("decode bs64 kv4096", "decode bs128 kv2048"),
        _gluon((16, 32), (1, 2, 4), (2, 4, 8)), kv="fp8_e4m3",
    ),
    "decode-fp8-mixed": ShapeClass(
        "decode", {"kind": "mha", "load": "mixed"}, ("decode bs64 kv128-32768 log-uniform",),
        _gluon((16, 32), (1, 2, 4), (2, 4, 8)), kv="fp8_e4m3",
    ),
    "mla-few-rows": ShapeClass(
        "decode", {**_MLA, "max_rows": 16}, ("mla H16 bs1 kv8192", "mla H16 bs32 kv4096", "mla H16 bs128 kv4096"),
        _decode((16, 32), (4, 8), (2, 3), (1,)), forced=(("gluon", False),),
    ),
    "mla": ShapeClass(
        "decode", _MLA, ("mla H128 bs1 kv8192", "mla H128 bs32 kv4096", "mla H128 bs128 kv4096"),
        _decode((32, 64), (4, 8), (1, 2), (1,)), forced=(("gluon", False),),
    ),
    "extend": ShapeClass(
        "extend", _MHA, tuple(name for name, shape in SHAPES.items() if shape.bench == "extend"),
        _extend((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3)), forced=(("gluon", False),),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=12)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    arch = detect().arch
    assert arch is not None, "no accelerator"
    entries, measured = [], []
    for name in given.classes.split(","):
        rows = list(measure(name, CLASSES[name], given.seconds, given.workers))
        measured += rows
        chosen = best(rows)
        if chosen is not None:
            entries.append(entry(CLASSES[name], arch, chosen))
            print(entries[-1], flush=True)
        (given.out / "triton_tune.json").write_text(json.dumps({**header(), "rows": measured}, indent=1) + "\n")
        (given.out / "parameters.toml").write_text("\n".join(entries))


def measure(name: str, shapes: ShapeClass, seconds: float, workers: int) -> Iterator[dict[str, Any]]:
    """One row for each candidate and shape where it was right."""
    tried = {f"{name} {i}": candidate for i, candidate in enumerate(shapes.candidates)}
    variants = {key: {**dict(shapes.forced), shapes.table: candidate} for key, candidate in tried.items()}
    VARIANTS.update(variants)
    jobs = [(SHAPES[shape], shapes.kv, key) for shape in shapes.shapes for key in tried]
    good = compiled_and_right(jobs, workers, time.monotonic() + 600, variants)
    for shape_name in shapes.shapes:
        shape: Shape = SHAPES[shape_name]
        work, _ = workload(shape, shapes.kv)
        for key, candidate in tried.items():
            if (shape.name, shapes.kv, key) not in good:
                continue
            parameters.FORCED.clear()
            parameters.FORCED.update(variants[key])
            backend = TritonBackend(plan(shape.config(kv_cache_dtype=shapes.kv), backend="triton").config, work.cache)
            ms = time_graph(forward_of(work, backend), seconds=seconds)
            row = {"class": name, "shape": shape.name, "ms": ms, **candidate}
            print(json.dumps(row), flush=True)
            yield row
        parameters.FORCED.clear()
        torch.cuda.empty_cache()


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The candidate with the least mean ratio to the best time of each shape; it must have run on all of them."""
    least: dict[str, float] = {}
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        candidate = json.dumps({k: v for k, v in row.items() if k not in ("class", "shape", "ms")})
        times.setdefault(candidate, {})[row["shape"]] = row["ms"]
        least[row["shape"]] = min(row["ms"], least.get(row["shape"], math.inf))
    whole = {candidate: of for candidate, of in times.items() if of.keys() == least.keys()}
    if not whole:
        return None
    ratio = {candidate: math.prod(ms / least[shape] for shape, ms in of.items()) for candidate, of in whole.items()}
    chosen: dict[str, Any] = json.loads(min(ratio, key=lambda candidate: ratio[candidate]))
    return chosen


def entry(shapes: ShapeClass, arch: str, chosen: dict[str, Any]) -> str:
    """The entry as parameters.toml has it."""
    facts = {"arch": arch, **shapes.facts, **chosen}
    lines = [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
    return f"[[{shapes.table}]]\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
