"""Replays: what the watch over them reports, with a stand-in for the device; and what they are given."""

from __future__ import annotations

import warnings
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core.planning.discovery import register
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing.cases import Case
from attn_core.testing.graphs import _Watch
from attn_core.testing.run import Target, run_case

_profile = torch.profiler.profile


def _profile_of_the_host(activities: object) -> torch.profiler.profile:
    """The profiler itself, warnings and all, which will not watch a device that is not there."""
    return _profile(activities=[torch.profiler.ProfilerActivity.CPU])


class Device:
    """What the watch asks of torch.cuda, without a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocations = 7
        self.modes: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"allocation.all.allocated": self.allocations})
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(torch.profiler, "profile", _profile_of_the_host)

    def set_mode(self, mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
        self.modes.append(mode)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_a_replay_that_keeps_the_rules_is_not_mentioned(device: Device) -> None:
    watch = _Watch(torch.device("cuda"), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch.replaying():
            pass
    assert watch.faults == []
    assert device.modes == ["error", "default"]


def test_waits_and_allocations_are_reported(device: Device) -> None:
    watch = _Watch(torch.device("cuda"), strict=True)
    with watch.replaying():
        device.allocations += 2
        raise RuntimeError("called a synchronizing CUDA operation")
    assert watch.faults == [
        "it waits for the host: called a synchronizing CUDA operation",
        "2 allocations on the device",
    ]
    assert device.modes[-1] == "default"


def test_other_errors_of_a_replay_are_its_own(device: Device) -> None:
    watch = _Watch(torch.device("cuda"), strict=True)
    with pytest.raises(RuntimeError, match="out of memory"), watch.replaying():
        raise RuntimeError("CUDA out of memory")
    assert device.modes[-1] == "default"


class Bounded(TorchNativeBackend):
    """Holds the bounds of a batch to the tables that it comes with."""

    name = "bounded"

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        assert batch.encoder_page_table is not None
        assert batch.max_encoder_seq_len <= batch.encoder_page_table.shape[1] * self.kv_cache.page_size
        super().init_forward_metadata_replay_cuda_graph(batch)


def test_bounds_of_a_replay_are_within_what_was_captured() -> None:
    manifest = Path(attn_core.__file__).with_name("torch_native.toml").read_text(encoding="utf-8")
    for have, want in (('"torch_native"', '"bounded"'), ('device = "cuda"', 'device = "cpu"')):
        manifest = manifest.replace(have, want)
    case = Case.parse("decode/2x1x16/2x1x16+cross/1@0e1/dtype=float32/page_size=1/loose/graph")
    with register(Bounded, Manifest.parse(manifest)) as ref:
        result = run_case(case, Target(ref, System("cpu"), torch.device("cpu")))
    assert result.faults == ()
