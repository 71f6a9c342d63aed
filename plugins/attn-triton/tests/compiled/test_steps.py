"""Steps that launch every kernel, run as the compiler made them for Hopper: every address inside what there is,
asynchronous work as early and as late as it may, and the numbers right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from attn_triton.backend import TritonBackend
from attn_triton.kernels import decode, extend, gluon_decode, gluon_extend, gluon_mla, join, write
from chosen_steps import STEPS, step_faults
from ptx_machine.launching import MachineLaunchers
from random_cases import GPU_SCALE, fault, make_scene

#: Steps as on a GPU, but short: the machine takes a second for a small one.
SCALE = replace(
    GPU_SCALE,
    dtypes=("float16", "bfloat16"),
    most_requests=3,
    query_lens=(0, 1, 2, 17, 33),
    prefixes=(0, 1, 17, 60, 130),
)
LAUNCHERS = {late: MachineLaunchers("sm_90", late=late) for late in (False, True)}


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("name", STEPS)
def test_what_was_compiled_is_right(name: str, late: bool) -> None:
    launchers, step = LAUNCHERS[late], STEPS[name]
    backend = partial(TritonBackend, chip=launchers.chip, launchers=launchers)
    launchers.launched.clear()
    assert step_faults(step, "cpu", backend) == []
    assert launchers.launched == Counter(step.kernels)


@pytest.mark.parametrize("seed", range(10))
def test_random_steps_are_right_as_compiled(seed: int) -> None:
    scene = make_scene(seed, "cpu", SCALE)
    launchers = LAUNCHERS[seed % 2 == 1]
    made = partial(TritonBackend, chip=launchers.chip, launchers=launchers)
    assert fault(scene, made) is None


def test_the_steps_launch_every_kernel() -> None:
    kernels = {
        name
        for module in (decode, extend, gluon_decode, gluon_extend, gluon_mla, join, write)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }
    launched = {kernel for step in STEPS.values() for kernel in step.kernels}
    assert kernels == launched
