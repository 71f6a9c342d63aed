"""Tests of the real torch-npu wheel, over stub libraries: empty ones, or those of a fake card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def card() -> Iterator[None]:
    """The fake card, for `test_fake_card*.py`; afterwards nothing may have gone wrong on it unseen."""
    from host_memory import HostMemory, graphs, install_kernels

    install_kernels()
    with HostMemory():
        yield
    faults, graphs.faults = graphs.faults, []
    assert faults == []
