"""No kernel reads a uniform register that nothing has written: what ptxas 12.8 makes of two swizzles over one place."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from attn_triton import geometry
from attn_triton.ahead import CHIPS, AheadLaunchers
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from chosen_steps import STEPS, ChosenStep, play
from sass import find_unwritten, ptxas_version, unwritten_reads

#: Widths of keys and values in an fp8 cache, which tiles of two swizzles would have held.
WIDTHS = ((64, 32), (80, 80), (32, 80), (256, 32), (40, 40))

ONE_PATH = """
.L_x_0:
        /*0000*/                   ULDC UR4, c[0x0][0x28c] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   UIADD3 UR6, UP0, UR4, 0x40, URZ ;
.L_x_2:
        /*0030*/                   HGMMA.64x32x16.F32 R56, R24, gdesc[UR4].tnspB, R56 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""


def test_a_register_that_one_way_writes_is_written() -> None:
    """Of the four registers at UR4, an instruction with its left operand in registers reads the last two."""
    assert [line.at for line in find_unwritten(ONE_PATH)] == ["0030"]
    assert find_unwritten(ONE_PATH.replace("ULDC UR4", "ULDC.128 UR4")) == []


def test_a_pair_that_nothing_writes_is_found() -> None:
    found = find_unwritten(ONE_PATH.replace("UP0, UR4, 0x40", "UP0, UR26, 0x40").replace("ULDC UR4", "ULDC.128 UR4"))
    assert [line.at for line in found] == ["0020"]


@pytest.fixture
def cubins(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The binaries of all that is compiled ahead."""
    found: list[bytes] = []
    monkeypatch.setattr("attn_triton.ahead.FINISHED", [lambda compiled: found.append(compiled.asm["cubin"])])
    return found


def _fp8(widths: tuple[int, int]) -> ChosenStep:
    kind = {"sliding_window": 50, "softcap": 20.0}
    return ChosenStep("extend", (65,), (30,), widths=widths, dtype="float16", kv_dtype="fp8_e5m2", page=64, kind=kind)


def _compile(step: ChosenStep) -> None:
    launchers = AheadLaunchers(Chip("sm_90", *CHIPS["sm_90"]))
    play(step, "cpu", partial(TritonBackend, chip=launchers.chip, launchers=launchers))


@pytest.mark.parametrize("step", [*STEPS.values(), *map(_fp8, WIDTHS)], ids=[*STEPS, *map(str, WIDTHS)])
def test_no_kernel_reads_what_nothing_wrote(step: ChosenStep, cubins: list[bytes], tmp_path: Path) -> None:
    _compile(step)
    assert cubins
    assert [fault for cubin in cubins for fault in unwritten_reads(cubin, tmp_path)] == []


def test_with_tiles_of_two_swizzles_ptxas_is_wrong(
    cubins: list[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Why tiles that are widened have a least width; to be dropped with the last Triton whose ptxas is 12.8."""
    monkeypatch.setattr(geometry, "WIDENED_PART", 16)
    _compile(_fp8((64, 32)))
    faults = [fault for cubin in cubins for fault in unwritten_reads(cubin, tmp_path)]
    assert bool(faults) == (ptxas_version() == "12.8"), faults
