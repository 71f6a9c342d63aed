"""The stand-in library for every test of this folder: `flash_attn_interface` and `flash_attn_config`, in sys.modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from attn_fa3 import library  # noqa: E402
from fake_flash_attention import FakeFlashAttention  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashAttention]:
    """A build of the library that has everything; ``fake.flags`` is its configuration, to be changed by a test."""
    stand_in = FakeFlashAttention()
    interface = ModuleType("flash_attn_interface")
    interface.flash_attn_3_gpu = stand_in.operators  # type: ignore[attr-defined]
    configuration = ModuleType("flash_attn_config")
    configuration.CONFIG = {"build_flags": stand_in.flags}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    monkeypatch.setitem(sys.modules, "flash_attn_config", configuration)
    library.load.cache_clear()
    yield stand_in
    library.load.cache_clear()
