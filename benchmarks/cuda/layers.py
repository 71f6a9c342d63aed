"""What a layer costs the host above its library's own call: short blocks of calls, ours and the library's in turn.

In inference mode, as engines and `attn generate` run; on one core, and without collections, as timeit measures.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from attn_core.bench.shapes import SHAPES
from cuda.direct import direct_call
from cuda.speed import BACKENDS, workload_of

#: Calls between two synchronisations: few enough that the host never waits for room in the device's queue.
CALLS = 16


class HostCost(NamedTuple):
    """Microseconds of the host in one call: medians over blocks, and the median and spread of what ours takes more."""

    ours: float
    library: float
    above: float
    quartiles: tuple[float, float]


def host_cost(ours: Callable[[], object], library: Callable[[], object], rounds: int = 60) -> HostCost:
    """Each round times a block of both, the one that comes first in turn: what slows the machine slows both alike."""
    for call in (ours, library):
        _block(call)
    samples = []
    cores = os.sched_getaffinity(0)
    gc.collect()
    gc.disable()
    os.sched_setaffinity(0, {max(cores)})  # this thread's, not those that CUDA has begun
    for i in range(rounds):
        times = {which: _block(call) for which, call in _in_turn(ours, library, i)}
        samples.append((times["ours"], times["library"]))
    os.sched_setaffinity(0, cores)
    gc.enable()
    above = [mine - theirs for mine, theirs in samples]
    low, _, high = statistics.quantiles(above, n=4)
    mine, theirs = (statistics.median(column) for column in zip(*samples, strict=True))
    return HostCost(mine, theirs, statistics.median(above), (low, high))


def _in_turn(ours: Callable[[], object], library: Callable[[], object], i: int) -> list[tuple[str, Any]]:
    both = [("ours", ours), ("library", library)]
    return both[::-1] if i % 2 else both


def _block(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def layer_rows(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each backend and shape of its kind; to be iterated in inference mode."""
    for name in names:
        for shape in SHAPES.values():
            if name not in BACKENDS[shape.bench]:
                continue
            row: dict[str, Any] = {"what": "layer", "backend": name, "shape": shape.name}
            try:
                work, backend = workload_of(name, shape)
                forward = work.call(backend)
                forward()
                cost = host_cost(forward, direct_call(name, work, backend), rounds)
                row |= {"ours_us": cost.ours, "library_us": cost.library, "above_us": cost.above}
                row["above_quartiles_us"] = list(cost.quartiles)
            except Exception:
                row["raised"] = traceback.format_exc(limit=4)
            print(f"[layers] {row}", flush=True)
            yield row
