"""Launch parameters of attn-triton measured on this GPU: whether the committed table, attn_triton/parameters.toml, has
the best of each class of shapes, or what is computed where it has nothing; and entries for what would be better.

    python benchmarks/triton_tune.py --out FOLDER [--classes decode-few,extend] [--seconds 0.03] [--budget 120]

The committed entry of a class and the candidates round it (`triton_tune_classes.py`) run every shape of the class. Each
is checked against the fp64 oracle first, side by side in processes, which is also what compiles. Then, alone on the
GPU, they are timed in turns, replay by replay, so that a clock that moves is the same for all. The best of a class has
the least geometric mean over its shapes. What is committed is kept within KEEP of it: less than that the run decides.

FOLDER/triton_tune.json has a row for each class (what=class: ratio of the committed entry to the best) and for each
measurement (what=candidate); FOLDER/parameters.toml the entries, kept or new.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from attn_core.bench.run import Workload, row
from attn_core.planning.config import AttentionConfig
from attn_core.planning.plan import plan
from attn_core.planning.system import detect
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.testing.reference import reference
from attn_triton import parameters
from attn_triton.backend import TritonBackend
from torch import Tensor
from triton_attention import DEVICE, forward_of, header, side_by_side
from triton_tune_classes import CLASSES, Candidate, ShapeClass, committed, label, shape_of

#: How much more time than the best the committed entry may take and be kept.
KEEP: Final = 1.03
#: The error that an output may have, by the dtype of the queries.
MOST_ERROR: Final = {"bfloat16": 1e-2, "float32": 1e-5}
#: What parameters.py computes where the table has nothing.
DEFAULT: Final = "default"
#: Candidates that one process checks at a time, and calls in a graph.
CHUNK, CALLS = 5, 10

#: (class, shape) -> label of a candidate -> error against the oracle, or why it is out.
Checked = dict[tuple[str, str], dict[str, float | str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--seconds", type=float, default=0.03, help="of each candidate at each shape")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which nothing new is begun")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.budget
    arch = detect().arch
    assert arch is not None, "no accelerator"
    chosen = {name: CLASSES[name] for name in given.classes.split(",")}
    tried = {name: candidates_of(of, arch) for name, of in chosen.items()}
    right = checked(chosen, tried, given.workers, deadline - given.budget / 2)
    classes: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for name, of in chosen.items():
        rows: list[dict[str, Any]] = []
        for shape in of.shapes:
            if time.monotonic() < deadline:
                rows += timed(name, of, shape, tried[name], right.get((name, shape), {}), given.seconds)
        measured += rows
        classes.append(verdict(name, of, arch, rows))
        print(json.dumps(classes[-1]), flush=True)
        whole = {**header(), "criterion": f"committed at most {KEEP} of the best", "rows": [*classes, *measured]}
        (given.out / "triton_tune.json").write_text(json.dumps(whole, indent=1) + "\n")
        kept = [as_toml(chosen[found["class"]], arch, found["take"]) for found in classes if found["take"]]
        (given.out / "parameters.toml").write_text("\n".join(kept))
    good = sum(bool(found["confirmed"]) for found in classes)
    print(f"{good} of {len(classes)} classes confirmed, {len(measured)} measurements", flush=True)


def candidates_of(of: ShapeClass, arch: str) -> dict[str, Candidate | None]:
    """The committed entry first, or DEFAULT where there is none, then the others."""
    entry = committed(of, arch)
    first = {DEFAULT: None} if entry is None else {label(entry): entry}
    return {**first, **{label(candidate): candidate for candidate in of.candidates}}


def checked(
    chosen: Mapping[str, ShapeClass], tried: Mapping[str, dict[str, Candidate | None]], workers: int, deadline: float
) -> Checked:
    """What every candidate was off at every shape, found in processes side by side."""
    jobs = []
    for name, of in chosen.items():
        every = list(tried[name].items())
        parts = [dict(every[i : i + CHUNK]) for i in range(0, len(every), CHUNK)]
        jobs += [(name, shape, part) for shape in of.shapes for part in parts]
    begun, found = time.monotonic(), Checked()
    for (name, shape, _), errors in side_by_side(errors_of, jobs, workers, deadline):
        found.setdefault((name, shape), {}).update(errors)
    for (name, shape), errors in found.items():
        for candidate, error in errors.items():
            if not isinstance(error, float):
                print(f"OUT {name}, {shape}, {candidate}: {error[-300:]}", flush=True)
    count = sum(isinstance(error, float) for errors in found.values() for error in errors.values())
    print(f"{count} right of {sum(map(len, found.values()))} after {time.monotonic() - begun:.0f} s", flush=True)
    return found


def errors_of(of_class: str, shape: str, tried: dict[str, Candidate | None]) -> dict[str, float | str]:
    """||out - ref|| / ||ref|| of each candidate, or why it is out: what it raised, or another tile that it became."""
    torch.set_num_threads(1)
    of = CLASSES[of_class]
    work, config = made(of, shape)
    error, most = oracle_of(work), MOST_ERROR[of.dtype]
    found: dict[str, float | str] = {}
    for name, candidate in tried.items():
        try:
            with ran(of) as tiles:
                out = prepared(of, work, config, candidate)()
            torch.cuda.synchronize()
            off = error(out)
            other = {key: value for key, value in (candidate or {}).items() if getattr(tiles[-1], key) != value}
            found[name] = f"runs as {tiles[-1]}" if other else off if off < most else f"off by {off}"
        except Exception:
            found[name] = traceback.format_exc(limit=-2)
    return found


@contextmanager
def ran(of: ShapeClass) -> Iterator[list[Any]]:
    """The tiles that steps bound meanwhile were given: what a candidate asks for may not fit into shared memory."""
    module, name = (
        ("attn_triton.partition", "cut_keys") if of.table == "decode" else ("attn_triton.extend", "extend_tile")
    )
    real, seen = getattr(importlib.import_module(module), name), []

    def recorded(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        seen.append(found.tile if of.table == "decode" else found)
        return found

    setattr(importlib.import_module(module), name, recorded)
    try:
        yield seen
    finally:
        setattr(importlib.import_module(module), name, real)


def made(of: ShapeClass, shape: str) -> tuple[Workload, AttentionConfig]:
    """A shape with its tensors, and what the backend is built of."""
    parameters.FORCED.clear()
    named = shape_of(shape)
    decided = plan(named.config(of.dtype, of.kv), backend="triton")
    return Workload.make(named, decided, DEVICE), decided.config


def prepared(
    of: ShapeClass, work: Workload, config: AttentionConfig, candidate: Candidate | None
) -> Callable[[], Tensor]:
    """A layer's call with a candidate, bound; with what the table gives for None. The step is its own."""
    parameters.FORCED.clear()
    parameters.FORCED.update(dict(of.forced) if candidate is None else {**dict(of.forced), of.table: candidate})
    own = replace(work, batch=replace(work.batch, plan_state=None))
    call = forward_of(own, TritonBackend(config, own.cache))
    call()
    parameters.FORCED.clear()
    return call


def oracle_of(work: Workload, rows: int = 16) -> Callable[[Tensor], float]:
    """||out - ref|| / ||ref|| over the last ``rows`` tokens of three requests, as `Workload.error` has it, with the
    reference computed once.
    """
    lengths = work.shape.query_lens
    chosen = sorted({0, len(lengths) // 2, len(lengths) - 1})
    tails = [min(rows, lengths[b]) for b in chosen]
    ends = [sum(lengths[: b + 1]) for b in chosen]
    picked = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, tails, strict=True)]).to(work.q.device)
    part = ForwardBatch.build(
        ForwardMode.EXTEND, query_lens=tails, seq_lens=[work.shape.seq_lens[b] for b in chosen],
        pages=[work.pages[b] for b in chosen], page_size=work.cache.page_size, device=work.q.device,
    )  # fmt: skip
    expected, _ = reference(work.q[picked], work.layer, part, work.cache)

    def error(out: Tensor) -> float:
        return float((out[picked].to(expected.device).double() - expected).norm() / expected.norm())

    return error


def timed(
    name: str,
    of: ShapeClass,
    shape: str,
    tried: Mapping[str, Candidate | None],
    errors: Mapping[str, float | str],
    seconds: float,
) -> list[dict[str, Any]]:
    """A row for each candidate that was right at ``shape``; the table itself must give the committed one."""
    work, config = made(of, shape)
    entry = committed(of, detect().arch or "")
    with ran(of) as tiles:
        prepared(of, work, config, None)
    if any(getattr(tiles[-1], key) != value for key, value in (entry or {}).items()):
        print(f"NOT SERVED {name}: the table gives {shape} {tiles[-1]}, not {entry}", flush=True)
        return []
    good = [key for key in tried if isinstance(errors.get(key), float)]
    times = in_turns([prepared(of, work, config, tried[key]) for key in good], seconds)
    itemsize = work.cache.dtype.itemsize
    found = []
    for key, ms in zip(good, times, strict=True):
        impl = "attn:triton" if key == next(iter(tried)) else f"attn:triton {key}"
        of_layer = row(work.shape, impl, ms, itemsize=itemsize)
        found.append({
            "what": "candidate", "class": name, "dtype": of.dtype, "candidate": key,
            "bench": of_layer.bench, "shape": shape, "impl": impl,
            "ms": ms, "gbs": of_layer.gbs, "tflops": of_layer.tflops, "err": errors[key],
        })  # fmt: skip
    parameters.FORCED.clear()
    torch.cuda.empty_cache()
    return found


def in_turns(calls: list[Callable[[], Tensor]], seconds: float) -> list[float]:
    """Median milliseconds of each call, of graphs of CALLS of them, replayed one after the other again and again."""
    graphs = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
        graphs.append(graph)
    total = sum(_replayed(graph) for graph in graphs for _ in range(2)) / 2
    rounds = max(5, min(50, int(seconds * 1e3 * len(graphs) / max(total, 1e-3))))
    samples = [[_replayed(graph) for graph in graphs] for _ in range(rounds)]
    return [statistics.median(of_one) / CALLS for of_one in zip(*samples, strict=True)]


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def verdict(name: str, of: ShapeClass, arch: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a class: its best candidate, the ratio of the committed entry to it, and which of them to take."""
    entry = committed(of, arch)
    best, means = best_of(of, rows)
    own = next(iter(candidates_of(of, arch)))
    ratio = means[own] / means[best] if best is not None and own in means else None
    confirmed = None if ratio is None else ratio <= KEEP
    return {
        "what": "class", "class": name, "table": of.table, "arch": arch, "facts": of.facts,
        "dtype": of.dtype, "shapes": list(of.shapes),
        "candidates": len(means), "committed": own, "best": best, "ratio": ratio, "confirmed": confirmed,
        "take": entry if confirmed or best is None else candidates_of(of, arch)[best],
    }  # fmt: skip


def best_of(of: ShapeClass, rows: list[dict[str, Any]]) -> tuple[str | None, dict[str, float]]:
    """The candidate with the least geometric mean over the shapes of the class, and the means of all that ran
    everywhere; none if a shape was not measured.
    """
    times: dict[str, dict[str, float]] = {}
    for measured in rows:
        times.setdefault(measured["candidate"], {})[measured["shape"]] = measured["ms"]
    means = {
        name: math.exp(statistics.fmean(map(math.log, of_one.values())))
        for name, of_one in times.items()
        if of_one.keys() == set(of.shapes)
    }
    return min(means, key=lambda name: means[name], default=None), means


def as_toml(of: ShapeClass, arch: str, chosen: Candidate) -> str:
    """The entry as parameters.toml has it."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"arch": arch, **of.facts, **chosen}.items()]
    return f"[[{of.table}]]\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
