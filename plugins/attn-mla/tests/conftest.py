"""The stand-in libraries for every test of this folder: `flash_mla` and `flashinfer.mla`, in sys.modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from attn_mla import flashmla, trtllm
from fake_mla_libraries import FakeLibraries


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibraries]:
    """Both stand-ins; what was called is in ``fake.calls``."""
    stand_in = FakeLibraries()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trtllm, "WORKSPACE_BYTES", 1024)
    for cached in (flashmla.load, trtllm.load, trtllm.workspace):
        cached.cache_clear()
    yield stand_in
    for cached in (flashmla.load, trtllm.load, trtllm.workspace):
        cached.cache_clear()
