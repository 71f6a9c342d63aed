"""One thread for every test, and the contract emulator as a fixture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from attn_ascend.emulator.device import EMULATOR

#: Tests of the real wheel import it, which needs the stub libraries of `make ascend-schema`; that target runs them.
collect_ignore = [] if importlib.util.find_spec("torch_npu") else ["ascend_wheel"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def emulated() -> Iterator[None]:
    """CPU tensors are taken, and every call is checked against the vendor's contract."""
    with EMULATOR:
        yield
