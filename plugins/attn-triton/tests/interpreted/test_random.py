"""Every kind of step, drawn at random, is right."""

from __future__ import annotations

import pytest
from random_cases import GPU_SCALE, Scale, fault, make_scene

INTERPRETER_SCALE = Scale(dtypes=("float16", "bfloat16", "float32"), kv_dtypes=("auto", "auto", "fp8_e4m3", "fp8_e5m2"))


@pytest.mark.parametrize("seed", range(40))
def test_random_step(seed: int, device: str) -> None:
    scene = make_scene(seed, device, GPU_SCALE if device == "cuda" else INTERPRETER_SCALE)
    assert fault(scene) is None
