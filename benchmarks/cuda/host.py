"""What a step costs the host: metadata and replays beside the libraries' own plans, writes; and graphs' memory."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from attn_core.bench.shapes import SHAPES, Shape
from attn_core.bench.timing import time_graph, time_host
from cuda.speed import DEVICE, workload_of

BACKENDS = ("fa3", "flashmla", "flashinfer", "flashinfer_mla")


def host_rows() -> list[dict[str, Any]]:
    """Host time of metadata and of replays at batch 64, for short and long contexts; graph memory; cache writes."""
    found: list[dict[str, Any]] = []
    measures = [
        *(partial(measure, name) for measure in (replay_costs, metadata_costs, memory) for name in BACKENDS),
        expansion,
        cache_writes,
    ]
    for measure in measures:
        try:
            rows = measure()
        except Exception:
            rows = [{"what": str(measure), "raised": traceback.format_exc(limit=4)}]
        found += rows
        for row in rows:
            print(f"[host] {row}", flush=True)
    return found


def quiet_us(call: Callable[[], object], repeats: int = 200) -> float:
    """Median microseconds of the host in ``call`` while the device has nothing to do: never waiting for it."""
    samples = []
    for i in range(repeats + 10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if i >= 10:
            samples.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(samples) * 1e6


def _decode_shape(name: str, batch: int, keys: int) -> Shape:
    mla = name in ("flashmla", "flashinfer_mla")
    like = SHAPES["mla H16 bs128 kv4096" if mla else "decode bs64 kv4096"]
    return replace(like, name=f"decode bs{batch} kv{keys}", query_lens=(1,) * batch, seq_lens=(keys,) * batch)


def replay_costs(name: str) -> list[dict[str, Any]]:
    """`init_forward_metadata_replay_cuda_graph` at batch 64, host microseconds; FlashInfer beside its own plans.

    host_us: of a replay on a device that has nothing to do; back_to_back_us: of replays without a step between them.
    """
    found = []
    for keys in (1024, 8192):
        work, backend = workload_of(name, _decode_shape(name, 64, keys))
        backend.config = backend.config.replace(max_context_len=131072)
        backend.init_cuda_graph_state(64, 64)
        backend.init_forward_metadata_capture_cuda_graph(work.batch)
        call = partial(backend.init_forward_metadata_replay_cuda_graph, work.batch)
        line: dict[str, Any] = {"what": "replay", "backend": name, "batch": 64, "keys": keys}
        line |= {"host_us": quiet_us(call), "back_to_back_us": time_host(call, DEVICE)}
        plans = {"flashinfer": fast_plan, "flashinfer_mla": latent_plan}.get(name)
        if plans is not None:
            theirs = plans(work, backend)
            line |= theirs | {"of_the_library": line["host_us"] / min(theirs.values())}
        found.append(line)
    return found


def fast_plan(work: Any, backend: Any) -> dict[str, float]:
    """The library's own plan for replays, `fast_decode_plan`: it leaves page indices and lengths to its caller."""
    from attn_flashinfer.page_indices import page_counts
    from attn_flashinfer.step import plan_options
    from flashinfer.decode import fast_decode_plan

    (captured,) = next(iter(backend._graphs._captured.values()))
    keys = backend._graphs.keys
    options = plan_options(captured.shape, captured.way, backend.config, backend.kv_cache)
    indptr, last = page_counts(keys.host_lens, backend.kv_cache.page_size)
    call = partial(
        fast_decode_plan, captured.planned.made, indptr, keys.indices, last, global_override_indptr_cpu=indptr,
        **options,
    )  # fmt: skip
    return {"library_fast_plan_us": quiet_us(call)}


def latent_plan(work: Any, backend: Any) -> dict[str, float]:
    """The library's plans of MLA, which has no fast one: the wrapper's, and the compiled planner with its staging."""
    from attn_flashinfer.mla_plan import plan_latent
    from attn_flashinfer.page_indices import page_counts

    graphs = backend._graphs
    ((shape, captured),) = next(iter(graphs._captured.values())).items()
    indptr, _ = page_counts(graphs.keys.host_lens, backend.kv_cache.page_size)
    planned, made = captured.planned, captured.planned.made
    pinned = torch.zeros(made._int_workspace_buffer.numel(), dtype=torch.uint8, pin_memory=True)
    planner = partial(
        made._cached_module.plan, made._float_workspace_buffer, made._int_workspace_buffer, pinned,
        planned.query_starts, indptr, graphs.keys.host_lens, *planned.sizes,
    )  # fmt: skip
    staged = quiet_us(planner)
    whole = partial(
        plan_latent, captured.wrapper, backend._library, shape, backend.config, backend.kv_cache, causal=False,
        query_starts=planned.query_starts, indptr=indptr, indices=graphs.keys.indices[: int(indptr[-1])],
        lens=graphs.keys.host_lens,
    )  # fmt: skip
    return {"library_planner_us": staged, "library_wrapper_plan_us": quiet_us(whole, 50)}


def metadata_costs(name: str) -> list[dict[str, Any]]:
    """`init_forward_metadata` of an eager decode at batch 64."""
    found = []
    for keys in (1024, 8192):
        work, backend = workload_of(name, _decode_shape(name, 64, keys))
        host = quiet_us(partial(backend.init_forward_metadata, work.batch), 100)
        found.append({"what": "metadata", "backend": name, "batch": 64, "keys": keys, "host_us": host})
    return found


def memory(name: str) -> list[dict[str, Any]]:
    """Bytes that 256 requests of 128k tokens take in graph state, by the allocator, with one captured batch size."""
    work, backend = workload_of(name, _decode_shape(name, 256, 64))
    backend.config = backend.config.replace(max_context_len=131072)
    backend.init_forward_metadata(work.batch)
    backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False)
    work.batch.plan_state = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    backend.init_cuda_graph_state(256, 256)
    state = torch.cuda.memory_allocated() - before
    backend.init_forward_metadata_capture_cuda_graph(work.batch)
    captured = torch.cuda.memory_allocated() - before
    reserved = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False)
    return [
        {
            "what": "graph memory",
            "backend": name,
            "requests": 256,
            "context": 131072,
            "page_size": backend.config.page_size,
            "state_mib": state / 2**20,
            "state_and_captured_mib": captured / 2**20,
            "graph_pool_mib": (torch.cuda.memory_reserved() - reserved) / 2**20,
        }
    ]


def expansion() -> list[dict[str, Any]]:
    """Page table to CSR for 64 requests of 128k tokens, microseconds of the GPU: of eager steps, and of replays."""
    from attn_flashinfer.kernels.metadata import Refill
    from attn_flashinfer.page_indices import expand

    found = []
    for page in (1, 16, 64):
        pages = 131072 // page
        table = torch.randint(1, 1 << 20, (64, pages), dtype=torch.int32, device="cuda")
        indptr = torch.arange(0, 65 * pages, pages, dtype=torch.int32, device="cuda")
        indices, filled = (torch.zeros(64 * pages, dtype=torch.int32, device="cuda") for _ in range(2))
        starts, last = (
            torch.zeros(65, dtype=torch.int32, device="cuda"),
            torch.zeros(64, dtype=torch.int32, device="cuda"),
        )
        refill, lens = Refill(starts, last, filled, page), torch.full((64,), 131072, dtype=torch.int32, device="cuda")
        us = 1e3 * time_graph(partial(expand, table, indptr, indices, longest=pages), seconds=0.1)
        replay_us = 1e3 * time_graph(partial(refill, lens, table, pages), seconds=0.1)
        assert torch.equal(indices, table.flatten())
        assert torch.equal(filled, table.flatten())
        assert torch.equal(starts, indptr)
        found.append({"what": "index expansion", "page_size": page, "gpu_us": us, "replay_gpu_us": replay_us})
    return found


def cache_writes() -> list[dict[str, Any]]:
    """`KVCache.write` of one decode step of 64 requests, as every backend calls it."""
    work, _ = workload_of("fa3", _decode_shape("fa3", 64, 1024))
    call = partial(work.cache.write, work.layer, work.batch.slot_mapping, work.k, work.v)
    return [
        {"what": "cache write", "batch": 64, "host_us": quiet_us(call), "gpu_us": 1e3 * time_graph(call, seconds=0.1)}
    ]
