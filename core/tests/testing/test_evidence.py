"""What evidence says of the software it was made with: whatever torch was built for, and whichever driver is there."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from attn_core.testing import evidence


class Driver:
    """Stands for the driver's library: answers with ``version``, or fails with ``code``."""

    def __init__(self, version: int, code: int = 0) -> None:
        self.version, self.code = version, code

    def cuDriverGetVersion(self, where: Any) -> int:  # noqa: N802 - the driver's own name
        where._obj.value = self.version
        return self.code


def absent(_name: str) -> Driver:
    raise OSError("no such library")


DRIVERS = {
    "a driver": (lambda _name: Driver(13020), {"cuda": "13.0", "cuda driver": "13.2"}),
    "one that does not answer": (lambda _name: Driver(0, code=100), {"cuda": "13.0"}),
    "another maker's": (absent, {"cuda": "13.0"}),
}


@pytest.mark.parametrize(("driver", "found"), DRIVERS.values(), ids=DRIVERS)
def test_the_driver_is_asked_itself(driver: Any, found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 for CUDA 13 has no `_cuda_getDriverVersion`, which once ended a run with nothing to show."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(ctypes, "CDLL", driver)
    assert evidence._of_cuda() == found
