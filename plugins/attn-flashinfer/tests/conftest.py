"""The stand-in library for every test of this folder: `flashinfer` and its modules, in sys.modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from attn_flashinfer import library
from attn_flashinfer.wrappers import workspace
from fake_flashinfer import FakeFlashInfer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlashInfer]:
    """The stand-in; what was called is in its lists."""
    stand_in = FakeFlashInfer()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("attn_flashinfer.wrappers.WORKSPACE_BYTES", 1024)
    monkeypatch.setattr("attn_flashinfer.plan_tables.PLAN_BYTES", 1024)
    library.load.cache_clear()
    workspace.cache_clear()
    yield stand_in
    library.load.cache_clear()
    workspace.cache_clear()
