"""Every kernel compiles for every chip that the manifest names, and fits into its shared memory."""

from __future__ import annotations

from functools import partial
from typing import Final

import pytest
from attn_core.runtime.batch import ForwardMode
from attn_triton.ahead import CHIPS, AheadLaunchers
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from chosen_steps import STEPS, ChosenStep, play

#: What asks for the most shared memory: many rows, wide heads, a tree's bits.
HARD: Final = {
    "a tree of many rows": ChosenStep(
        "tree_depth decode", (4,), (30,), ForwardMode.TARGET_VERIFY, heads=(16, 1), tree=True
    ),
    "a tree over wide heads": ChosenStep(
        "tree_depth decode", (4,), (30,), ForwardMode.TARGET_VERIFY, heads=(16, 1), widths=(256, 256), tree=True
    ),
    "a tree in one way for all batches": ChosenStep(
        "tree_depth extend", (4,), (30,), ForwardMode.TARGET_VERIFY, heads=(16, 1), tree=True, invariant=True
    ),
    "wide heads": ChosenStep("extend", (70,), (30,), widths=(256, 256), kind={"sliding_window": 20}),
    "fp32": ChosenStep("extend", (70,), (30,), dtype="float32", kind={"softcap": 20.0}),
    "MLA in one way for all batches": ChosenStep(
        "extend",
        (1,),
        (30,),
        ForwardMode.DECODE,
        heads=(16, 1),
        widths=(576, 512),
        page=64,
        layout="MLA",
        invariant=True,
    ),
}


def _claimed(arch: str, step: ChosenStep) -> bool:
    """What the manifest says of fp8 and fp32."""
    if arch.startswith("gfx"):
        return step.kv_dtype == "auto" and step.dtype != "float32"
    return step.kv_dtype == "auto" or arch != "sm_80"


ALL: Final = {**STEPS, **HARD}
CASES: Final = [(arch, name) for arch in CHIPS for name, step in ALL.items() if _claimed(arch, step)]


@pytest.mark.parametrize(("arch", "name"), CASES, ids=[f"{arch}-{name}" for arch, name in CASES])
def test_a_step_compiles(arch: str, name: str) -> None:
    launchers = AheadLaunchers(Chip(arch, *CHIPS[arch]))
    play(ALL[name], "cpu", partial(TritonBackend, chip=launchers.chip, launchers=launchers))
    assert {found.kernel for found in launchers.compiled} >= {"extend_kernel" if ALL[name].ragged else "write_kernel"}
    assert all(found.shared <= launchers.chip.shared_memory for found in launchers.compiled)
