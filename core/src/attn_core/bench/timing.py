"""How long a call takes: the median of CUDA-graph replays, or the best of many calls on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def time_call(call: Callable[[], object], device: torch.device, *, seconds: float = 0.5) -> float:
    """Milliseconds of ``call``, whatever the device is; inputs must be random, never zeros."""
    return time_graph(call, seconds=seconds) if device.type == "cuda" else time_eager(call, device, seconds=seconds)


def time_graph(call: Callable[[], object], *, seconds: float = 0.5, calls_per_graph: int = 10) -> float:
    """Median milliseconds of one ``call``, over replays of a CUDA graph that holds ``calls_per_graph`` of them.

    A graph takes the launch gaps out, so that the kernel is timed and not the host. The call must be capturable: warmed
    up, without host synchronisation.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls_per_graph):
            call()
    graph.replay()
    torch.cuda.synchronize()
    once = _event_ms(graph.replay)
    repeats = max(5, min(200, int(seconds * 1e3 / max(once, 1e-3))))
    return statistics.median(_event_ms(graph.replay) for _ in range(repeats)) / calls_per_graph


def time_eager(call: Callable[[], object], device: torch.device, *, seconds: float = 0.5) -> float:
    """Least milliseconds of one ``call`` on the host clock: on a shared machine the least is the least disturbed."""
    best = float("inf")
    call()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        call()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def time_host(call: Callable[[], object], device: torch.device, *, repeats: int = 200) -> float:
    """Median microseconds that the host spends in ``call``, not waiting for the device."""
    for _ in range(10):
        call()
    _synchronize(device)
    samples = []
    for i in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
        if i % 20 == 19:
            _synchronize(device)
    return statistics.median(samples) * 1e6


def _event_ms(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
