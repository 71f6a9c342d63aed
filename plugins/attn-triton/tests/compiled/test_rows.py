"""Rows of queries and output move 16 bytes at a time wherever they begin at multiples of it."""

from __future__ import annotations

import re
from functools import partial

import pytest
from attn_triton.ahead import CHIPS, AheadLaunchers
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
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
