"""What attn-triton takes of the host: a decode layer's call and where its time goes, metadata, replay; bytes of the
graphs' state.

    python benchmarks/triton_host.py --out FOLDER

Microseconds are medians of single calls (`time_host`) at batch 64, after a second of the same calls. "of it" rows are
parts of the call above them, each timed alone: `launch` is the driver's call with arguments that are ready, `python` is
the whole call with launches that do nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attn_core.bench.shapes import SHAPES
from attn_core.bench.timing import time_host
from attn_triton.launch import Bound
from triton_attention import DEVICE, header, workload

BATCH = 64
KEYS = (1024, 16384)
#: Seconds of calls before any counts: a processor that idled takes a while to be as fast as it is.
AWAKE = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = [*decode_calls(), *(row for mla in (False, True) for row in graph_state(mla))]
    for row in rows:
        print(json.dumps(row), flush=True)
    about = {**header(), "processor": processor(), "rows": rows}
    (given.out / "triton_host.json").write_text(json.dumps(about, indent=1) + "\n")


def processor() -> str:
    """The name of the host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def decode_calls() -> Iterator[dict[str, Any]]:
    """One layer's decode, with and without the write of keys, and a step's metadata; lengths that the host has or
    not.
    """
    like = SHAPES["decode bs64 kv4096"]
    for keys in KEYS:
        shape = replace(like, name=f"decode bs{BATCH} kv{keys}", seq_lens=(keys,) * BATCH)
        for lengths in ("host", "device"):
            work, backend = workload(shape, "auto", "table" if lengths == "host" else "device")
            batch, layer, q = work.batch, work.layer, work.q
            backend.init_forward_metadata(batch)
            attend = partial(backend.forward, q, None, None, layer, batch, save_kv_cache=False)
            both = partial(backend.forward, q, work.k, work.v, layer, batch)
            into = partial(both, out=torch.empty_like(q))
            awake = time.perf_counter() + AWAKE
            while time.perf_counter() < awake:
                time_host(both, DEVICE)
            calls: dict[str, Callable[[], object]] = {
                "attention": attend,
                "attention and write": both,
                "attention and write, output given": into,
                "metadata": partial(backend.init_forward_metadata, batch),
            }
            for what, call in calls.items():
                yield _row(what, lengths, keys, time_host(call, DEVICE))
            both()  # what the new step needs is cut and bound before launches do nothing
            with unittest.mock.patch.object(Bound, "launch", nothing):
                yield _row("of it: python", lengths, keys, time_host(both, DEVICE))
            yield _row("of it: output made", lengths, keys, time_host(partial(torch.empty_like, q), DEVICE))
            for name, launch in launches(into).items():
                yield _row(f"of it: launch of {name}", lengths, keys, time_host(launch, DEVICE))
            del work, backend
            torch.cuda.empty_cache()
    one = torch.zeros(1, device=DEVICE)
    yield _row("beside it: torch adds 1 to a number", "host", 1, time_host(partial(one.add_, 1), DEVICE))


def nothing(bound: Bound, x: int, y: int = 1) -> None:
    """In place of a launch."""


def launches(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The launches of a call, by kernel, each with its arguments ready; the output must outlive the call."""
    found: dict[str, Callable[[], object]] = {}
    launch = Bound.launch

    def seen(self: Bound, x: int, y: int = 1) -> None:
        found[self._launcher.name] = partial(launch, self, x, y)
        launch(self, x, y)

    with unittest.mock.patch.object(Bound, "launch", seen):
        call()
    return found


def _row(what: str, lengths: str, keys: int, host_us: float) -> dict[str, Any]:
    return {"what": what, "lengths": lengths, "batch": BATCH, "keys": keys, "host_us": host_us}


def graph_state(mla: bool) -> Iterator[dict[str, Any]]:
    """Replay at batch 64 for short and long contexts, and the state of 256 requests at 128k context."""
    like = SHAPES["mla H128 bs128 kv4096" if mla else "decode bs64 kv4096"]
    for keys in KEYS:
        shape = replace(
            like, name=f"{like.bench} bs{BATCH} kv{keys}", query_lens=(1,) * BATCH, seq_lens=(keys,) * BATCH
        )
        work, backend = workload(shape, "auto")
        backend.config = backend.config.replace(max_context_len=131072)
        backend.init_cuda_graph_state(BATCH, BATCH)
        backend.init_forward_metadata_capture_cuda_graph(work.batch)
        replay = time_host(partial(backend.init_forward_metadata_replay_cuda_graph, work.batch), DEVICE)
        yield {"what": "replay", "kind": like.kind, "batch": BATCH, "keys": keys, "host_us": replay}
    before = torch.cuda.memory_allocated()
    backend.init_cuda_graph_state(256, 256)
    graphs = backend._graphs
    assert graphs is not None
    yield {
        "what": "graph state",
        "kind": like.kind,
        "beside_page_table_mib": graphs.nbytes / 2**20,
        "page_table_mib": graphs.pages.nbytes / 2**20,
        "allocated_mib": (torch.cuda.memory_allocated() - before) / 2**20,
    }


if __name__ == "__main__":
    main()
