"""One thread for every test, and the emulated chip as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attn_wave.emulator.device import Gfx942


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def emulated() -> Iterator[Gfx942]:
    """Kernels run in the emulator, on CPU tensors."""
    with Gfx942() as chip:
        yield chip
