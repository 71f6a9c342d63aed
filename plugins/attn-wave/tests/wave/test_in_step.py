"""Waves of several workgroups that run in step do, to the bit, what each of them does alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from attn_wave.emulator import launch as launching
from attn_wave.emulator.device import Gfx942
from attn_wave.emulator.faults import EmulationError, MemoryFaultError
from attn_wave.emulator.launch import Pointer, launch, run_to_barrier
from attn_wave.emulator.wave import GARBAGE, Wave

from .programs import program
from .small import forwards
from .test_instructions import ARITHMETIC, LDS_STORES, ODD, STORES
from .waves import LANE, WRITABLE, wave_of

LDS = 1024
WORDS = {f"v{i}": 1000 * i + LANE for i in range(2, 6)}
NUMBERS = {f"{kind}{i}": 0x3C00 * (LANE % 7 + i) << 16 | 0x3A00 + LANE for kind in "va" for i in range(12)}
MATRIX = [
    "v_mfma_f32_16x16x16_f16 v[8:11], v[0:1], v[2:3], v[4:7]",
    "v_mfma_f32_16x16x16_bf16 v[8:11], v[0:1], a[2:3], 0",
    "v_mfma_f32_32x32x8_f16 a[16:31], v[0:1], v[2:3], 1.0",
]
CASES: list[tuple[str, Mapping[str, Any]]] = [
    *((text, given) for text, given, _ in ARITHMETIC),
    *((text, {"v0": 16 * LANE, "v1": WRITABLE >> 32, "s[4:5]": WRITABLE, **WORDS}) for text in STORES),
    *((text, {"v0": 16 * (LANE % 32), **WORDS}) for text in LDS_STORES),
    *((text, NUMBERS) for text in MATRIX),
    ("scratch_store_dwordx2 off, v[2:3], off offset:4", WORDS),
    ("scratch_load_dword v4, off, off offset:4", WORDS),
    ("v_readlane_b32 s0, v1, s2", {"v1": 3 * LANE, "s2": 40}),
    ("ds_permute_b32 v0, v1, v2", {"v1": 4 * (63 - LANE), "v2": 10 * LANE}),
    ("v_div_scale_f32 v3, s[2:3], v2, v2, v1", {"v1": LANE, "v2": LANE}),
]


def another(given: Mapping[str, Any]) -> dict[str, Any]:
    """Other registers, with addresses inside the same buffers: lanes exchanged, small scalars and the mask changed."""
    changed: dict[str, Any] = {"exec": ODD}
    for name, value in given.items():
        if name[0] in "va" and name != "vcc":
            changed[name] = np.roll(np.broadcast_to(np.asarray(value), 64), 8)
        elif name == "scc":
            changed[name] = 1 - value
        elif name != "exec":
            changed[name] = value if value >> 32 else value ^ 5
    return changed


def state(wave: Wave) -> dict[str, Any]:
    """Everything that an instruction can change, but for memory."""
    own = wave.lds[wave.lds_first : wave.lds_first + LDS]
    registers = [wave.vector[:64].copy(), wave.accumulators[:64].copy()]
    return {
        "registers": np.stack(registers),
        "lds": own.copy(),
        "scalar": list(wave.scalar),
        "scc": wave.scc,
        "scratch": wave.scratch.copy(),
    }


def written(waves: list[Wave]) -> bytes:
    return bytes(waves[0].memory.find(WRITABLE, 1, "a test").data)


@pytest.mark.parametrize(("text", "given"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_an_instruction_in_step_is_that_of_each_alone(text: str, given: Mapping[str, Any]) -> None:
    code = program(f"{text}\ns_endpgm", lds=LDS)
    sets = [given, another(given), given]
    alone, together = [wave_of(registers) for registers in sets], [wave_of(registers) for registers in sets]
    for waves in (alone, together):
        lds = np.concatenate([wave.lds for wave in waves])
        for i, wave in enumerate(waves):
            wave.memory, wave.lds, wave.lds_first, wave.lds_size = waves[0].memory, lds, LDS * i, LDS
    with np.errstate(all="ignore"):
        counts = sum(run_to_barrier(code, [wave]) for wave in alone), run_to_barrier(code, together)
    assert counts == (6, 6)
    assert written(alone) == written(together)
    for one, other in zip(map(state, alone), map(state, together), strict=True):
        np.testing.assert_equal(one, other)


#: out[64 * group + lane] = the sum of the numbers below bound[group], taken in a loop, plus 1000 in odd workgroups
PARTING = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
s_load_dwordx2 s[6:7], s[0:1], 0x8
s_lshl_b32 s3, s2, 2
s_load_dword s8, s[6:7], s3
s_mov_b32 s9, 0
v_mov_b32_e32 v2, 0
s_cmp_ge_u32 s9, s8
s_cbranch_scc1 3
v_add_u32_e32 v2, s9, v2
s_add_u32 s9, s9, 1
s_branch 65531
s_bitcmp1_b32 s2, 0
s_cbranch_scc0 1
v_add_u32_e32 v2, 0x3e8, v2
s_lshl_b32 s3, s2, 8
v_lshlrev_b32_e32 v1, 2, v0
v_add_u32_e32 v1, s3, v1
global_store_dword v1, v2, s[4:5]
s_endpgm
"""


def parted(bounds: list[int]) -> tuple[torch.Tensor, int]:
    out, bound = torch.full((len(bounds), 64), -1, dtype=torch.int32), torch.tensor(bounds, dtype=torch.int32)
    given = [Pointer(out, "out", writable=True), Pointer(bound, "bound")]
    count = launch(program(PARTING), (len(bounds), 1, 1), (64, 1, 1), given)
    return out, count


def test_workgroups_that_part_and_meet_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [3, 0, 7, 3, 1, 7, 7, 2]
    out, count = parted(bounds)
    assert out.tolist() == [[n * (n - 1) // 2 + 1000 * (i % 2)] * 64 for i, n in enumerate(bounds)]
    monkeypatch.setattr(launching, "GANG", 1)
    one_by_one, counted = parted(bounds)
    assert (one_by_one.tolist(), counted) == (out.tolist(), count)


def test_each_workgroup_has_the_lds_it_asked_for_and_no_more() -> None:
    """Also where that of the next one lies behind."""
    text = "v_lshlrev_b32_e32 v1, 2, v0\nds_write_b32 v1, v0 offset:{offset}\ns_endpgm"
    launch(program(text.format(offset=0), lds=256), (4, 1, 1), (64, 1, 1), [])
    with pytest.raises(MemoryFaultError, match="0 to 256"):
        launch(program(text.format(offset=4), lds=256), (4, 1, 1), (64, 1, 1), [])


LEFT = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_lshl_b32 s3, s2, 9
v_add_u32_e32 v3, s3, v1
ds_write_b32 v1, v0
{between}
v_xor_b32_e32 v2, 0x100, v1
ds_read_b32 v2, v2
global_store_dword v3, v2, s[4:5]
s_endpgm
"""


@pytest.mark.parametrize("backwards", [False, True])
def test_a_barrier_that_is_missing_shows_in_every_workgroup(backwards: bool) -> None:
    """Waves of one workgroup are not in step: the first reads what the second has not yet written."""
    wanted = torch.arange(128, dtype=torch.int32).expand(5, 128) ^ 64
    for between, right in (("s_barrier", [128] * 5), ("s_nop 0", [64] * 5)):
        out = torch.zeros(5, 128, dtype=torch.int32)
        code = program(LEFT.format(between=between), lds=512)
        launch(code, (5, 1, 1), (128, 1, 1), [Pointer(out, "out", writable=True)], backwards=backwards)
        assert (out == wanted).sum(1).tolist() == right
        assert set(out[out != wanted].tolist()) <= {GARBAGE}


def test_a_fault_in_one_of_them_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    out, bound = torch.zeros(2, 64, dtype=torch.int32), torch.tensor([1, 1, 1], dtype=torch.int32)
    given = [Pointer(out, "out", writable=True), Pointer(bound, "bound")]
    with pytest.raises(MemoryFaultError, match="lie in no buffer"):
        launch(program(PARTING), (3, 1, 1), (64, 1, 1), given)
    monkeypatch.setattr(launching, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(EmulationError, match="more than 1000 instructions"):
        launch(program("s_branch 65535"), (3, 1, 1), (64, 1, 1), [])


def test_kernels_leave_the_same_bits(emulated: Gfx942, monkeypatch: pytest.MonkeyPatch) -> None:
    together = [(made.out, made.lse) for made in forwards(seed=2)]
    counted, emulated.runtime.instructions = emulated.runtime.instructions, 0
    monkeypatch.setattr(launching, "GANG", 1)
    for (out, lse), made in zip(together, forwards(seed=2), strict=True):
        assert torch.equal(out, made.out)
        assert torch.equal(lse, made.lse)
    assert emulated.runtime.instructions == counted
