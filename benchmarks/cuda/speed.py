"""Times each backend beside its library, called directly with the same metadata, in CUDA graphs and on the host."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from attn_core.bench.results import Row
from attn_core.bench.run import Workload, row
from attn_core.bench.shapes import SHAPES, Shape
from attn_core.bench.timing import time_graph, time_host
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


def _workload(name: str, shape: Shape) -> tuple[Workload, AttentionBackend]:
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
    work, backend = _workload(name, shape)
    forward = work.call(backend)
    error = work.error(forward())
    direct = direct_call(name, work, backend)
    # in turn, twice: what drifts then drifts for both
    times: dict[str, list[float]] = {"ours": [], "direct": []}
    for _ in range(2):
        times["ours"].append(time_graph(forward, seconds=seconds))
        times["direct"].append(time_graph(direct, seconds=seconds))
    ours, theirs = min(times["ours"]), min(times["direct"])
    host_ours, host_theirs = time_host(forward, DEVICE), time_host(direct, DEVICE)
    note = f"host {host_ours:.1f} us, library {host_theirs:.1f} us; {ours / theirs:.3f} of the library"
    print(
        f"[speed] {name:15s} {shape.name:28s} {ours:.4f} ms, direct {theirs:.4f} ms; err {error:.1e}; {note}",
        flush=True,
    )
    yield row(shape, f"attn:{name}", ours, itemsize=2, err=error, note=note)
    yield row(shape, name, theirs, itemsize=2, note=f"host {host_theirs:.1f} us")


def host_rows() -> list[dict[str, Any]]:
    """Host time of metadata and of replays at batch 64, for short and long contexts; graph memory; cache writes."""
    found = []
    backends = ("fa3", "flashmla", "flashinfer", "flashinfer_mla")
    measures = [
        *(partial(measure, name) for measure in (replay_costs, metadata_costs, memory) for name in backends),
        expansion,
        cache_writes,
    ]
    for measure in measures:
        try:
            found += measure()
        except Exception:
            found.append({"what": str(measure), "raised": traceback.format_exc(limit=4)})
    for line in found:
        print(f"[host] {line}", flush=True)
    return found


def _decode_shape(name: str, batch: int, keys: int) -> Shape:
    mla = name in ("flashmla", "flashinfer_mla")
    like = SHAPES["mla H16 bs128 kv4096" if mla else "decode bs64 kv4096"]
    return replace(like, name=f"decode bs{batch} kv{keys}", query_lens=(1,) * batch, seq_lens=(keys,) * batch)


def replay_costs(name: str) -> list[dict[str, Any]]:
    """`init_forward_metadata_replay_cuda_graph` at batch 64, host microseconds; FlashInfer beside its own plan."""
    found = []
    for keys in (1024, 8192):
        work, backend = _workload(name, _decode_shape(name, 64, keys))
        backend.config = backend.config.replace(max_context_len=131072)
        backend.init_cuda_graph_state(64, 64)
        backend.init_forward_metadata_capture_cuda_graph(work.batch)
        replay = time_host(lambda b=backend, w=work: b.init_forward_metadata_replay_cuda_graph(w.batch), DEVICE)
        line = {"what": "replay", "backend": name, "batch": 64, "keys": keys, "host_us": replay}
        if name == "flashinfer":
            line["library_fast_plan_us"] = _library_fast_plan(work, backend)
        found.append(line)
    return found


def _library_fast_plan(work: Workload, backend: Any) -> float:
    planner = backend._graphs
    (captured,) = next(iter(planner._captured.values()))
    keys = planner.keys
    from attn_flashinfer.step import plan_options

    options = plan_options(captured.shape, captured.way, backend.config, backend.kv_cache)
    wrapper, indptr, last = captured.planned.made, keys.host_indptr, keys.host_last_page_len
    from flashinfer.decode import fast_decode_plan

    def call() -> None:
        fast_decode_plan(wrapper, indptr, keys.indices, last, global_override_indptr_cpu=indptr, **options)

    return time_host(call, DEVICE)


def metadata_costs(name: str) -> list[dict[str, Any]]:
    """`init_forward_metadata` of an eager decode at batch 64."""
    found = []
    for keys in (1024, 8192):
        work, backend = _workload(name, _decode_shape(name, 64, keys))
        host = time_host(lambda b=backend, w=work: b.init_forward_metadata(w.batch), DEVICE)
        found.append({"what": "metadata", "backend": name, "batch": 64, "keys": keys, "host_us": host})
    return found


def memory(name: str) -> list[dict[str, Any]]:
    """Bytes that 256 requests of 128k tokens take in graph state, by the allocator, with one captured batch size."""
    work, backend = _workload(name, _decode_shape(name, 256, 64))
    backend.config = backend.config.replace(max_context_len=131072)
    backend.init_forward_metadata(work.batch)
    backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    backend.init_cuda_graph_state(256, 256)
    state = torch.cuda.memory_allocated() - before
    backend.init_forward_metadata_capture_cuda_graph(work.batch)
    graph = torch.cuda.CUDAGraph()
    reserved = torch.cuda.memory_reserved()
    with torch.cuda.graph(graph):
        backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False)
    return [
        {
            "what": "graph memory",
            "backend": name,
            "state_mib": state / 2**20,
            "state_and_captured_mib": (torch.cuda.memory_allocated() - before) / 2**20,
            "graph_pool_mib": (torch.cuda.memory_reserved() - reserved) / 2**20,
        }
    ]


def expansion() -> list[dict[str, Any]]:
    """Page table to CSR for 64 requests of 128k tokens, microseconds of the GPU."""
    from attn_flashinfer.page_indices import expand

    found = []
    for page in (1, 16, 64):
        pages = 131072 // page
        table = torch.randint(1, 1 << 20, (64, pages), dtype=torch.int32, device="cuda")
        indptr = torch.arange(0, 65 * pages, pages, dtype=torch.int32, device="cuda")
        indices = torch.empty(64 * pages, dtype=torch.int32, device="cuda")
        us = 1e3 * time_graph(lambda t=table, p=indptr, i=indices, n=pages: expand(t, p, i, longest=n), seconds=0.1)
        assert torch.equal(indices, table.flatten())
        found.append({"what": "index expansion", "page_size": page, "gpu_us": us})
    return found


def cache_writes() -> list[dict[str, Any]]:
    """`KVCache.write` of one decode step of 64 requests, as every backend calls it."""
    work, _ = _workload("fa3", _decode_shape("fa3", 64, 1024))
    call = lambda: work.cache.write(work.layer, work.batch.slot_mapping, work.k, work.v)  # noqa: E731
    return [
        {
            "what": "cache write",
            "batch": 64,
            "host_us": time_host(call, DEVICE),
            "gpu_us": 1e3 * time_graph(call, seconds=0.1),
        }
    ]


def median_us(call: Callable[[], object], repeats: int = 50) -> float:
    """Median microseconds with the device waited for."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6
