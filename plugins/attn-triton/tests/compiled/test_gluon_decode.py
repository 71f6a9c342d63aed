"""Decode over an fp8 cache on Hopper: where it is taken, and that its tiles stay in registers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attn_core.planning.config import LayerKind
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_triton.ahead import CHIPS, AheadLaunchers
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, Strides
from attn_triton.hopper_decode import takes
from attn_triton.kinds import Kind
from chosen_steps import STEPS, play

HOPPER = Chip("sm_90", *CHIPS["sm_90"])
ROWS = Strides(1 << 14, 1 << 10, 128)
GEOMETRY = Geometry(8, 4, 128, 128, False, 16, ROWS, ROWS, torch.bfloat16, torch.float8_e4m3fn)
KIND = Kind(GEOMETRY, None, False, None, False)


def _of(**changed: Any) -> Kind:
    return replace(KIND, geometry=replace(GEOMETRY, **changed))


@pytest.mark.parametrize(
    "kind",
    [KIND, replace(KIND, window=100, has_cap=True), _of(group=16), _of(qk_dim=64, v_dim=64), _of(page_size=1)],
    ids=["plain", "window and cap", "many heads", "narrow", "pages of one"],
)
def test_an_fp8_cache_is_decoded_from_registers(kind: Kind) -> None:
    assert takes(HOPPER, kind, None)
    assert not takes(Chip("sm_80", *CHIPS["sm_80"]), kind, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"kv_dtype": torch.bfloat16}, {"aligned": False}, {"group": 17}, {"qk_dim": 96}, {"v_dim": 256},
        {"dtype": torch.float32},
    ],
    ids=["16 bit", "rows anywhere", "too many heads", "odd width", "wide", "exact"],
)  # fmt: skip
def test_what_the_kernel_is_not_written_for_is_the_plain_ones(changed: dict[str, Any]) -> None:
    assert not takes(HOPPER, _of(**changed), None)


@pytest.mark.parametrize(("first", "aligned"), [(0, True), (16, True), (8, False)])
def test_pools_tell_whether_their_rows_begin_at_sixteen_bytes(first: int, aligned: bool) -> None:
    kind = LayerKind(8, 2, 64, 64, scale=0.125, layer_ids=(0,))
    shape = (3, 16, 2, 64)
    keys, values = (torch.zeros(math.prod(shape) + 16, dtype=torch.uint8).view(torch.float8_e5m2) for _ in range(2))
    own = keys[first : first + math.prod(shape)].view(shape)
    cache = KVCache({0: own}, {0: values[: math.prod(shape)].view(shape)}, page_size=16, layout="NHD")
    assert Geometry.of_cache(AttentionLayer.of_kind(kind, 0), cache, torch.bfloat16).aligned is aligned


def test_no_tile_goes_through_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop over tiles keys and values are loaded 16 bytes at a time, widened where they are, and multiplied."""
    found: list[str] = []
    monkeypatch.setattr("attn_triton.ahead.FINISHED", [lambda compiled: found.append(compiled.asm["ptx"])])
    launchers = AheadLaunchers(HOPPER)
    play(STEPS["decode over fp8"], "cpu", partial(TritonBackend, chip=launchers.chip, launchers=launchers))
    (ptx,) = (text for text in found if "mma.sync" in text)
    (loop,) = (body for body in _loops(ptx) if "mma.sync" in body)
    assert len(re.findall(r"mma\.sync", loop)) == 64
    assert len(re.findall(r"ld\.global\.v4\.b32", loop)) == 16
    assert len(re.findall(r"cvt\.rn\.f16x2\.e4m3x2", loop)) == 128
    assert "shared" not in loop
    assert "bar.sync" not in loop


def _loops(ptx: str) -> Iterator[str]:
    """What lies between a label and a branch back to it, without what lies in a loop inside."""
    begun = {found[1]: found.end() for found in re.finditer(r"^(\$\w+):", ptx, re.M)}
    for branch in re.finditer(r"bra(?:\.uni)?\s+(\$\w+);", ptx):
        if begun[branch[1]] < branch.start():
            body = ptx[begun[branch[1]] : branch.start()]
            if not re.search(r"bra(?:\.uni)?\s+(\$\w+);", body):
                yield body
