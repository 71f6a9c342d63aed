"""Level `schema`: what was written down is what the wheel has, and its Meta kernels agree with every call we make."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch_npu
from attn_ascend.emulator.library import vendored
from attn_ascend.operators import Operators
from meta_kernels import compared

FUSED = ("npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score_v2")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schemas_written_down_are_the_wheels() -> None:
    tool = load(Path(__file__).parents[2] / "tools/vendor_schemas.py")
    assert tool.vendor_schemas() == vendored()
    assert torch_npu.__version__ == vendored()["torch_npu"]


def test_every_operator_is_found_in_the_wheel() -> None:
    assert Operators.here() == Operators(2, True, True, True, True, True)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_operators_have_meta_kernels(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")


@pytest.mark.usefixtures("emulated")
def test_the_meta_kernels_are_asked_and_can_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    from attn_ascend.emulator import fused

    tokens = torch.randn(3, 4, 128).half()
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)

    def call() -> object:
        return torch.ops.npu.npu_fused_infer_attention_score_v2(
            tokens, tokens, tokens, atten_mask=mask, actual_seq_qlen=[3], actual_seq_kvlen=[3], num_query_heads=4,
            num_key_value_heads=4, input_layout="TND", sparse_mode=3,
        )  # fmt: skip

    before = compared[FUSED[1]]
    call()
    assert compared[FUSED[1]] == before + 1
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] = fused.compute
    monkeypatch.setattr(fused, "compute", lambda given: tuple(t[:-1] for t in compute(given)))
    with pytest.raises(AssertionError, match="Meta kernel says"):
        call()
