"""What no manifest of the workspace claims is refused with a reason that fits, on every chip that any of them names."""

from __future__ import annotations

import pytest
import torch
from attn_core.planning.discovery import discover
from attn_core.planning.system import System
from attn_core.testing.refusals import check_refusal, refusal_cases
from attn_core.testing.run import Target

CHIPS = (
    "cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "rocm:gfx942", "rocm:gfx950", "npu:ascend910b", "xpu",
)  # fmt: skip


@pytest.mark.parametrize("chip", CHIPS)
def test_what_is_not_claimed_is_refused(chip: str) -> None:
    system = System.parse(chip)
    tried = 0
    for ref in discover().backends:
        target = Target(ref, system, torch.device("cpu"))
        for case in refusal_cases(ref.manifest, "contract", system):
            tried += 1
            assert check_refusal(case, target, probe=False).faults == (), f"{ref.listed}: {case.id}"
    assert tried
