"""The conformance kit on the emulated chip, a few cases at a time; all of it is `attn verify wave --device ...`."""

from __future__ import annotations

from attn_core.testing import verify
from attn_core.testing.report import Report

DEVICE = "emulated:gfx942"


def kit(select: str, count: int) -> Report:
    """``count`` cases of the contract tier with ``select`` in their id, as different as can be."""
    return verify("wave", "contract", DEVICE, select=select, max_cases=count, probe=False, workers=0)


def failures(select: str, count: int) -> list[str]:
    """The ids of those that fail."""
    return [result.case.id for result in kit(select, count).failures]
