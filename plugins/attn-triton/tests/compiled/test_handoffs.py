"""MLA decode on Hopper: what orders its three roles. Without any one barrier or fence, the machine finds who races.

racecheck of compute-sanitizer cannot tell: it does not follow an order through a barrier of some warps and an arrival
of one of their threads (TUNING.md), which is how the roles of a Gluon kernel hand things over.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chosen_steps
import pytest
import torch
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_triton.ahead import CHIPS, AheadLaunchers
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.kernels import gluon_mla
from chosen_steps import STEPS, ChosenStep, play, step_faults
from ptx_machine import launching
from ptx_machine.launching import MachineLaunchers
from ptx_machine.program import Program, parse
from ptx_machine.walking import MachineError
from random_cases import fill
from torch import Tensor

SOURCE = Path(gluon_mla.__file__).read_text().splitlines()
ONE = STEPS["decode MLA by the copy engine"]
LINE = STEPS["decode MLA by the copy engine, a line"]
#: Two programs for the 128 heads.
HEADS = replace(ONE, heads=(128, 1))
#: Requests that part at other places than programs do, so that a program has several pieces.
PIECES = replace(LINE, new=(1,) * 5, cached=(130, 63, 0, 200, 64))
#: Several queries a request in two programs each, of two tiles, of one, of none.
QUERIES = replace(ONE, mode=ForwardMode.TARGET_VERIFY, heads=(40, 1), new=(2, 1, 0), cached=(126, 60, 0))


def machine(multiprocessors: int = 132) -> partial[TritonBackend]:
    launchers = MachineLaunchers("sm_90", late=True)
    return partial(TritonBackend, chip=replace(launchers.chip, multiprocessors=multiprocessors), launchers=launchers)


@pytest.mark.parametrize("step", [HEADS, PIECES, QUERIES], ids=["two programs a request", "pieces", "queries"])
@pytest.mark.parametrize("multiprocessors", [132, 3])
def test_roles_hand_over_in_order(step: ChosenStep, multiprocessors: int) -> None:
    assert step_faults(step, "cpu", machine(multiprocessors)) == []


@pytest.mark.parametrize("louder", [4, 12])
def test_what_was_computed_is_scaled_when_scores_outgrow_it(louder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima grow by less than is let pass, and by more, in some rows and tiles."""

    def loud(cache: KVCache, *args: Any) -> None:
        fill(cache, *args)
        cache.k(0).mul_(louder)

    monkeypatch.setattr(chosen_steps, "fill", loud)
    assert step_faults(replace(ONE, cached=(390,)), "cpu", machine(1)) == []


class Gapped(TritonBackend):
    """Gives the output a stride that is no multiple of 16 bytes."""

    def forward_decode(self, q: Tensor, *args: Any, **options: Any) -> Any:
        out = torch.empty(*q.shape[:2], 513, dtype=q.dtype)[..., :512]
        return super().forward_decode(q, *args, **{**options, "out": out})


def test_rows_of_the_output_may_begin_anywhere() -> None:
    launchers = MachineLaunchers("sm_90", late=True)
    assert step_faults(PIECES, "cpu", partial(Gapped, chip=launchers.chip, launchers=launchers)) == []


@pytest.mark.parametrize(("backend", "single"), [(TritonBackend, False), (Gapped, True)], ids=["even", "odd"])
def test_rows_are_stored_16_bytes_at_a_time(
    backend: type[TritonBackend], single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores of 2 bytes were a tenth of a program's time; where strides are odd there is nothing else."""
    found: list[str] = []
    monkeypatch.setattr("attn_triton.ahead.FINISHED", [lambda compiled: found.append(compiled.asm["ptx"])])
    launchers = AheadLaunchers(Chip("sm_90", *CHIPS["sm_90"]))
    play(ONE, "cpu", partial(backend, chip=launchers.chip, launchers=launchers))
    ptx = next(ptx for ptx in found if "mla_kernel(" in ptx)
    assert bool(re.search(r"st\.global\.b16", ptx)) == single
    assert ("st.global.v4.b32" in ptx) != single


def without(pattern: str, before: str, ptx: str) -> str:
    """``ptx`` without what matches ``pattern`` and belongs to the last such line of source before ``before``."""
    arrival = next(i for i, line in enumerate(SOURCE) if before in line)
    statement = {"bar": "gl.thread_barrier()", "fence": "fence_async_shared()"}[pattern]
    number = max(i for i in range(arrival) if statement in SOURCE[i]) + 1
    kept, place, dropped = [], 0, 0
    for line in ptx.splitlines():
        located = re.match(r"\s*\.loc\s+1\s+(\d+)", line)
        place = int(located[1]) if located else place
        if place == number and re.match(rf"\s*{pattern}\.", line):
            dropped += 1
        else:
            kept.append(line)
    assert dropped, f"nothing of {statement} at line {number}"
    return "\n".join(kept)


@pytest.mark.parametrize(
    ("pattern", "before", "said"),
    [
        ("bar", "mbarrier.arrive(ready.", r"ld\.shared.* reads what warp \d+ .* wrote"),
        ("fence", "mbarrier.arrive(ready.", r"wgmma.* gives the engines, with no fence, what warp \d+ .* stored"),
        ("bar", "mbarrier.arrive(consumed.", r"writes what warp \d+ .* reads"),
        ("bar", "mbarrier.arrive(ends.index(SUMMED)", r"ld\.shared.* reads what warp \d+ .* wrote"),
    ],
    ids=["flags", "proxy", "consumed", "sums"],
)  # fmt: skip
def test_without_one_of_them_roles_race(pattern: str, before: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def edited(ptx: str, shared: int) -> Program:
        return parse(without(pattern, before, ptx) if "mla_kernel" in ptx else ptx, shared)

    monkeypatch.setattr(launching, "parse", edited)
    with pytest.raises(MachineError, match=said):
        step_faults(PIECES, "cpu", machine(3))
