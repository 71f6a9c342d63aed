"""One thread for every test, the contract emulator as a fixture, and the real wheel behind it where there is one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

#: The environment of `make ascend-schema` has the wheel, which needs CANN or that target's stub libraries. Tests of the
#: wheel itself run there alone, and all others run there once more, on the vendor's schemas.
WHEEL = importlib.util.find_spec("torch_npu") is not None
collect_ignore = [] if WHEEL else ["ascend_wheel"]

if WHEEL:
    import torch_npu  # noqa: F401 - before the emulator, whose kernels then stand behind the wheel's own schemas

from attn_ascend.emulator.device import EMULATOR  # noqa: E402 - after it


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def emulated() -> Iterator[None]:
    """CPU tensors are taken, every call is checked against the contract and, with the wheel, by its Meta kernels."""
    with ExitStack() as stack:
        stack.enter_context(EMULATOR)
        if WHEEL:
            from meta_kernels import MetaKernels

            stack.enter_context(MetaKernels())
        yield
