"""Times each backend beside its library, called directly with the same metadata, in CUDA graphs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import torch
from attn_core.bench.results import Row
from attn_core.bench.run import Workload, row
from attn_core.bench.shapes import SHAPES, Shape
from attn_core.bench.timing import time_graph
from attn_core.planning.config import AttentionConfig
from attn_core.planning.discovery import discover
from attn_core.planning.plan import plan
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.loading import load_backend
from cuda.direct import direct_call

DEVICE = torch.device("cuda")
BACKENDS = {
    "decode": ("fa3", "flashinfer", "fa4"),
    "mixed": ("fa3", "flashinfer", "fa4"),
    "extend": ("fa3", "flashinfer", "fa4"),
    "mla": ("flashmla", "flashinfer_mla"),
}


def backend_of(name: str, config: AttentionConfig, cache: KVCache) -> AttentionBackend:
    """The backend itself, without router or conversion: what one layer's call costs is asked."""
    return load_backend(discover().find(name))(config, cache)


def speed_rows(seconds: float, name: str) -> Iterator[Row]:
    """For every shape of this backend: ``attn:NAME`` and, in turn with it, the library called directly."""
    for shape in SHAPES.values():
        if name in BACKENDS[shape.bench]:
            try:
                yield from _pair(name, shape, seconds)
            except Exception:
                print(f"[speed] {name} {shape.name} RAISED {traceback.format_exc(limit=4)}", flush=True)


def workload_of(name: str, shape: Shape) -> tuple[Workload, AttentionBackend]:
    config = shape.config()
    chosen = plan(
        config,
        backend={"decode" if shape.phase == "decode" else "prefill": name},
        fallback="allow",
        phases=(shape.phase,),
    )
    work = Workload.make(shape, chosen, DEVICE)
    return work, backend_of(name, chosen.config, work.cache)


def _pair(name: str, shape: Shape, seconds: float) -> Iterator[Row]:
    work, backend = workload_of(name, shape)
    forward = work.call(backend)
    error = work.error(forward())
    direct = direct_call(name, work, backend)
    # in turn, twice: what drifts then drifts for both
    times: dict[str, list[float]] = {"ours": [], "direct": []}
    for _ in range(2):
        times["ours"].append(time_graph(forward, seconds=seconds))
        times["direct"].append(time_graph(direct, seconds=seconds))
    ours, theirs = min(times["ours"]), min(times["direct"])
    note = f"{ours / theirs:.3f} of the library"
    print(
        f"[speed] {name:15s} {shape.name:28s} {ours:.4f} ms, direct {theirs:.4f} ms; err {error:.1e}; {note}",
        flush=True,
    )
    yield row(shape, f"attn:{name}", ours, itemsize=2, err=error, note=note)
    yield row(shape, name, theirs, itemsize=2)
