"""What the tests of the kit share: one thread, the target torch_native, and small steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attn_core.planning.discovery import discover
from attn_core.planning.system import System
from attn_core.testing.run import Target


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target() -> Target:
    return Target(discover().find("torch_native"), System("cpu"), torch.device("cpu"))
