"""Rows of queries and output move 16 bytes at a time wherever they begin at multiples of it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from attn_triton.ahead import CHIPS, AheadLaunchers
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.launch import Bound, Launchers
from attn_triton.strided import Strided
from chosen_steps import STEPS, play

_SINGLE = re.compile(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16\b.*")


def ptx_of(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The PTX of the extend kernel of a step."""
    found: list[str] = []
    monkeypatch.setattr("attn_triton.ahead.FINISHED", [lambda compiled: found.append(compiled.asm["ptx"])])
    launchers = AheadLaunchers(Chip("sm_90", *CHIPS["sm_90"]))
    play(STEPS[name], "cpu", partial(TritonBackend, chip=launchers.chip, launchers=launchers))
    return next(ptx for ptx in found if "extend_kernel(" in ptx)


@pytest.mark.parametrize("name", ["extend by the copy engine, over many tiles", "extend with a window"])
def test_rows_move_16_bytes_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In extend kernels the 2-byte stores of a block of rows took longer than two tiles of keys."""
    ptx = ptx_of(name, monkeypatch)
    assert _SINGLE.findall(ptx) == []
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("name", ["extend by the copy engine, odd strides", "extend, odd strides"])
def test_rows_at_odd_strides_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half of the rule above: what it looks for is what such a row takes."""
    assert _SINGLE.findall(ptx_of(name, monkeypatch))


#: Constants lie behind the arguments.
CONSTANT = 7


def test_a_layer_with_other_strides_gets_a_launch_of_its_own() -> None:
    """Layers of one kind share what was bound once a step; an engine may still hand one of them a wider buffer."""
    units: list[int] = []

    def make(unit: int) -> Bound:
        units.append(unit)
        args: list[Any] = [0] * 6
        return Bound(Launchers(torch.device("cpu"), dependent=False).get(_Kernel(), {"C": CONSTANT}, {}, ()), args)

    strided = Strided(make, slice(1, 5))
    q, wide, odd = torch.empty(3, 4, 64), torch.empty(3, 4, 192)[..., :64], torch.empty(3, 4, 65)[..., :64]
    assert strided.of(q, q).values == [0, 32, 8, 32, 8, 0, CONSTANT]
    assert strided.of(wide, q).values == [0, 96, 24, 32, 8, 0, CONSTANT]
    assert strided.of(q, odd).values == [0, 256, 64, 260, 65, 0, CONSTANT]
    assert strided.of(q, q).values == [0, 32, 8, 32, 8, 0, CONSTANT]
    assert units == [8, 1]


class _Kernel:
    __name__ = "kernel"
    arg_names = ("A", "q_token", "q_head", "out_token", "out_head", "B", "C")
    params = ()
