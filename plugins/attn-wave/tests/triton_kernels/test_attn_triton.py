"""attn-triton's kernels, compiled for gfx942 as on an MI300X, pass cases of the conformance kit in the emulator."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import attn_core
import pytest
import torch
from attn_core.planning.discovery import discover
from attn_core.testing.cases import Case
from attn_core.testing.run import Target, run_case
from attn_wave.emulator.code_object import disassembler
from attn_wave.emulator.device import Gfx942

from .emulated import TritonOnGfx942, _Launcher, forget_compiled

#: one of each kernel and of what it can do: plain, paged decode that is split, a tree, a mixed batch, MLA
CASES = [
    "extend/8x2x64/32@0/dtype=float16",
    "extend/8x2x128+window=16+softcap=1.5+sinks/5@20/page_size=1/layout=HND/lse",
    "decode/8x2x64/1@31/dtype=float16",
    "decode/32x2x128+window=16+softcap=1.5+sinks/1@95/page_size=48/lse",
    "verify/8x2x64/5@27/dtype=float16/tree=top2dead",
    "mixed/6x2x64/1@15,16@0/batch=2/dtype=float16",
    "decode/mla:4x1x576-512+scale=0.125/1@31/layout=MLA",
    "draft_extend/mla:4x1x576-512+scale=0.125/2@30/layout=MLA",
]


@pytest.fixture(scope="module")
def target() -> Target:
    try:
        disassembler("gfx942")
    except attn_core.errors.PluginLoadError as error:
        pytest.skip(f"code that was just compiled needs a disassembler: {error}")
    text = files("attn_triton").joinpath("triton.toml").read_text(encoding="utf-8")
    attn_core.register(TritonOnGfx942, text.replace('"triton"', f'"{TritonOnGfx942.name}"', 1))
    system = replace(Gfx942().system(), name="AMD gfx942, machine code emulated on the CPU")
    return Target(discover().find(TritonOnGfx942.name), system, torch.device("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_the_kit_passes(case: str, target: Target) -> None:
    result = run_case(Case.parse(case), target)
    assert (result.status, result.faults) == ("passed", ())


def test_a_planted_fault_is_caught(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another scale for the scores: the first float that a kernel is given."""
    right = _Launcher.build

    def wrong(self: _Launcher, args: object, odd: object) -> object:
        run = right(self, args, odd)  # type: ignore[arg-type]

        def scaled(x: int, y: int, stream: int, *values: object) -> None:
            run(x, y, stream, *[value * 1.5 if isinstance(value, float) else value for value in values])

        return scaled

    monkeypatch.setattr(_Launcher, "build", wrong)
    forget_compiled()
    assert run_case(Case.parse(CASES[0]), target).status == "failed"
    forget_compiled()
