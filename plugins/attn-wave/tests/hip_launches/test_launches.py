"""The backend through the real wave_runtime: what this hands to libamdhip64 is what the code objects expect."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attn_core.errors import KernelError, PluginLoadError
from attn_wave import runtime
from attn_wave.emulator.device import Gfx942
from attn_wave.emulator.launch import Pointer

sys.path.insert(0, str(Path(__file__).parent.parent))
from wave.small import exact, forwards

from .card import Card

STREAM = 0x5EED


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A machine with one MI300X, as far as the backend can see, that lends the card every tensor it names."""
    made = Card()
    monkeypatch.setenv("ATTN_FORCE_SYSTEM", "rocm:gfx942")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    right = runtime.Kernel.launch

    def seen(kernel: runtime.Kernel, tensors: dict[str, Any], *rest: Any) -> None:
        made.knows(tensors, runtime.WRITTEN)
        right(kernel, tensors, *rest)

    monkeypatch.setattr(runtime.Kernel, "launch", seen)
    yield made
    assert made.errors == []


def test_what_it_computes_is_exact_and_the_same_as_without_it(card: Card) -> None:
    through = list(forwards(seed=3))
    with Gfx942():
        emulated = list(forwards(seed=3))
    for one, other in zip(through, emulated, strict=True):
        assert torch.equal(one.out, other.out)
        assert torch.equal(one.lse, other.lse)
        assert (one.out.double() - exact(one)[0]).abs().max() < 5e-3
    # two phases each
    assert len(card.launches) == 2 * len(through)


def test_every_launch_is_on_torchs_stream_with_addresses_and_then_sizes(card: Card) -> None:
    next(iter(forwards(seed=3)))
    for (stream, raw), addresses, sizes in zip(card.launches, (12, 6), (3, 2), strict=True):
        assert stream == STREAM
        words = struct.unpack(f"<{len(raw) // 8}q", raw)
        assert [isinstance(card.tensors.get(word), Pointer) for word in words] == [True] * addresses + [False] * sizes


@pytest.mark.parametrize("refused", ["_load", "_function"])
def test_what_hip_refuses_is_an_error(refused: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Card, refused, lambda *asked: 0)
    refusing = Card()
    with pytest.raises(KernelError, match="the fake card refused"):
        next(iter(forwards(seed=3)))
    assert refusing.launches == []


def test_a_launch_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    monkeypatch.setattr(Card, "_launch", lambda *asked: 1)
    Card()
    with pytest.raises(KernelError, match="the fake card refused"):
        next(iter(forwards(seed=3)))


def test_without_hip_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import wave_runtime  # type: ignore[import-not-found]

    def missing() -> None:
        raise RuntimeError("Failed to load libamdhip64.so")

    runtime._wave_runtime.cache_clear()
    monkeypatch.setattr(wave_runtime, "load_hip_functions", missing)
    monkeypatch.setenv("ATTN_FORCE_SYSTEM", "rocm:gfx942")
    with pytest.raises(PluginLoadError, match="libamdhip64"):
        next(iter(forwards(seed=3)))
    runtime._wave_runtime.cache_clear()
