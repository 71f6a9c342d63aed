"""The benchmark of host times, without a GPU: every launch that it times reads what was prepared for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.bench.shapes import Shape
from attn_core.planning.plan import plan
from attn_core.planning.system import System
from attn_triton.ahead import CHIPS
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.launch import Launcher, Launchers
from attn_triton.partition import Partitions, Schedule

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))
import triton_attention  # type: ignore[import-not-found,unused-ignore]
import triton_host  # type: ignore[import-not-found,unused-ignore]

CHIP = Chip("sm_90", *CHIPS["sm_90"])


def test_no_launch_reads_a_schedule_that_nothing_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's line is cut when its first layer binds, so that must not happen while launches do nothing."""
    made: list[Schedule] = []
    written: set[int] = set()
    unwritten: list[str] = []

    class Noted(Launcher):
        __slots__ = ()

        def build(self, args: Any, odd: frozenset[int]) -> Callable[..., None]:
            def launched(x: int, y: int, stream: int, *values: Any) -> None:
                if self.name == "schedule_kernel":
                    written.add(values[2])
                elif self.name == "decode_kernel" and not self.constants["FIXED"] and values[13] not in written:
                    unwritten.append(self.name)

            return launched

    class NotedLaunchers(Launchers):
        launcher = Noted

    schedule = Partitions.schedule

    def kept(self: Partitions, *args: Any) -> Schedule:
        found = schedule(self, *args)
        made.append(found)  # so that no other has its address
        return found

    def built(config: Any, cache: Any) -> TritonBackend:
        launchers = NotedLaunchers(torch.device("cpu"), dependent=CHIP.dependent_launch)
        return TritonBackend(config, cache, chip=CHIP, launchers=launchers)

    monkeypatch.setattr(Partitions, "schedule", kept)
    monkeypatch.setattr(triton_attention, "TritonBackend", built)
    monkeypatch.setattr(triton_attention, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(triton_attention, "plan", partial(plan, system=System.parse("cuda:sm_90")))
    for name, value in {"DEVICE": torch.device("cpu"), "KEYS": (512,), "BATCH": 4, "AWAKE": 0.0}.items():
        monkeypatch.setattr(triton_host, name, value)
    monkeypatch.setattr(triton_host, "SHAPES", {"decode bs64 kv4096": Shape("decode", "few", (1,) * 4, (512,) * 4)})
    monkeypatch.setattr(triton_host, "time_host", lambda call, device: (call(), 0.0)[1])
    rows = list(triton_host.decode_calls())
    assert any(row["what"] == "of it: launch of decode_kernel" and row["lengths"] == "device" for row in rows)
    assert made
    assert not unwritten
