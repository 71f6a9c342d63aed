"""The stand-in for every test of this folder: `flash_attn_interface` and `flash_attn_config`, in sys.modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from attn_fa3 import fa4, library
from fake_flash_attention import FakeFlashAttention


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashAttention]:
    """A build of the library that has everything; ``fake.flags`` is its configuration, to be changed by a test."""
    stand_in = FakeFlashAttention()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    library.load.cache_clear()
    fa4.load.cache_clear()
    yield stand_in
    library.load.cache_clear()
    fa4.load.cache_clear()
