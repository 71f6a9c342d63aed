"""A launch runs every workgroup, its waves from barrier to barrier, and refuses what a chip would not survive."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.faults import EmulationError, MemoryFaultError
from attn_wave.emulator.launch import Pointer, launch

from .programs import program

#: v1 = the thread's number in its workgroup, of 64 threads a wave
WRITE = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_mul_i32 s3, s2, {bytes}
v_add_u32_e32 v1, s3, v1
global_store_dword v1, v0, s[4:5]
s_endpgm
"""


def test_every_thread_of_every_workgroup_runs_once() -> None:
    out = torch.full((3, 128), -1, dtype=torch.int32)
    launch(program(WRITE.format(bytes=512)), (3, 1, 1), (128, 1, 1), [Pointer(out, "out", writable=True)])
    assert torch.equal(out, torch.arange(128, dtype=torch.int32).expand(3, 128))


def test_lanes_beyond_the_threads_are_not_active() -> None:
    out = torch.full((64,), -1, dtype=torch.int32)
    launch(program(WRITE.format(bytes=0)), (1, 1, 1), (40, 1, 1), [Pointer(out, "out", writable=True)])
    assert out.tolist() == [*range(40), *[-1] * 24]


def test_a_view_begins_where_it_begins() -> None:
    whole = torch.zeros(100, dtype=torch.int32)
    launch(program(WRITE.format(bytes=0)), (1, 1, 1), (64, 1, 1), [Pointer(whole[10:], "view", writable=True)])
    assert whole.tolist() == [*[0] * 10, *range(64), *[0] * 26]


@pytest.mark.parametrize("threads", [65, 128])
def test_a_write_past_a_tensor_is_a_fault(threads: int) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(MemoryFaultError, match="out of 256 bytes, 256 bytes from its start"):
        launch(program(WRITE.format(bytes=0)), (1, 1, 1), (threads, 1, 1), [Pointer(out, "out", writable=True)])


def test_a_write_to_what_is_only_read_is_a_fault() -> None:
    with pytest.raises(MemoryFaultError, match="which is only read"):
        launch(
            program(WRITE.format(bytes=0)), (1, 1, 1), (64, 1, 1), [Pointer(torch.zeros(64, dtype=torch.int32), "q")]
        )


def test_two_arguments_on_one_storage_are_one_memory() -> None:
    """Keys and values in one pool; a tensor that is only read as one argument may be written as another."""
    pool = torch.zeros(128, dtype=torch.int32)
    given = [Pointer(pool[:64], "read"), Pointer(pool[64:], "written", writable=True)]
    text = WRITE.format(bytes=0).replace("0x0", "0x8")
    launch(program(text), (1, 1, 1), (64, 1, 1), given)
    assert pool.tolist() == [*[0] * 64, *range(64)]


EXCHANGE = """
s_load_dwordx2 s[4:5], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
ds_write_b32 v1, v0
{between}
v_xor_b32_e32 v2, 0x100, v1
ds_read_b32 v3, v2
global_store_dword v1, v3, s[4:5]
s_endpgm
"""


def exchanged(between: str, *, lds: int = 512, backwards: bool = False) -> torch.Tensor:
    """What each of 128 threads reads that its partner in the other wave has written to the LDS."""
    out = torch.zeros(128, dtype=torch.int32)
    code = program(EXCHANGE.format(between=between), lds=lds)
    launch(code, (1, 1, 1), (128, 1, 1), [Pointer(out, "out", writable=True)], backwards=backwards)
    return out


@pytest.mark.parametrize("backwards", [False, True])
def test_a_barrier_holds_until_every_wave_is_there(backwards: bool) -> None:
    assert torch.equal(exchanged("s_barrier", backwards=backwards), torch.arange(128, dtype=torch.int32) ^ 64)


@pytest.mark.parametrize("backwards", [False, True])
def test_without_it_a_wave_reads_garbage(backwards: bool) -> None:
    """Whichever runs first: poison, NaN as a number of any type."""
    out = exchanged("s_nop 0", backwards=backwards)
    assert not torch.equal(out, torch.arange(128, dtype=torch.int32) ^ 64)
    assert torch.isnan(out.view(torch.float32)).sum() == 64
    assert torch.isnan(out.view(torch.float16)).sum() >= 64
    assert torch.isnan(out.view(torch.bfloat16)).sum() >= 64


def test_lds_that_the_code_object_did_not_ask_for_is_a_fault() -> None:
    with pytest.raises(MemoryFaultError, match="LDS bytes"):
        exchanged("s_barrier", lds=508)


def test_lds_may_be_asked_for_by_the_launch() -> None:
    out = torch.zeros(128, dtype=torch.int32)
    code = program(EXCHANGE.format(between="s_barrier"), lds=8)
    launch(code, (1, 1, 1), (128, 1, 1), [Pointer(out, "out", writable=True)], dynamic_lds=504)
    assert torch.equal(out, torch.arange(128, dtype=torch.int32) ^ 64)


def test_registers_are_garbage_at_first() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    text = WRITE.format(bytes=0).replace("v1, v0, s[4:5]", "v1, v9, s[4:5]")
    launch(program(text), (1, 1, 1), (64, 1, 1), [Pointer(out, "out", writable=True)])
    assert torch.isnan(out.view(torch.float32)).all()


def test_a_loop_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_wave.emulator.launch.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(EmulationError, match="more than 1000 instructions"):
        launch(program("s_branch -1"), (1, 1, 1), (64, 1, 1), [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v_dot4_i32_i8 v0, v1, v2, v3", "v_dot4_i32_i8 .* is not modelled"),
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 4), 0", "is not modelled"),
        ("s_branch 7", "goes to 0x20, where no instruction begins"),
        ("v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], 0 cbsz:1", "broadcasts between blocks are not modelled"),
        ("v_add_u32_dpp v0, v1, v2 wave_shl:1 row_mask:0xf bank_mask:0xf", "not modelled"),
        ("buffer_load_dword v0, v1, s[0:3], 0 idxen", "indexed buffers"),
    ],
)
def test_what_is_not_modelled_is_said(text: str, says: str) -> None:
    with pytest.raises(EmulationError, match=says):
        launch(program(f"{text}\ns_endpgm"), (1, 1, 1), (64, 1, 1), [])


def test_another_float_mode_is_refused() -> None:
    """Such as denormals flushed, which compilers can ask for."""
    code = replace(program("s_endpgm"), float_mode=0xC0)
    with pytest.raises(EmulationError, match="float mode 0xc0"):
        launch(code, (1, 1, 1), (64, 1, 1), [])


def test_missing_arguments_are_refused() -> None:
    with pytest.raises(EmulationError, match="8 bytes of arguments"):
        launch(program("s_endpgm", argument_size=16), (1, 1, 1), (64, 1, 1), [1])


@pytest.mark.parametrize(
    ("blob", "says"), [(b"text", "no ELF file"), (b"\x7fELF" + bytes(0x2C) + b"\x30" + bytes(16), "architecture 0x30")]
)
def test_what_is_no_code_object_is_refused(blob: bytes, says: str) -> None:
    with pytest.raises(EmulationError, match=says):
        CodeObject.parse(blob)


def test_tensors_of_another_device_are_refused() -> None:
    with pytest.raises(EmulationError, match="lies on meta"):
        launch(program("s_endpgm"), (1, 1, 1), (64, 1, 1), [Pointer(torch.zeros(1, device="meta"), "q")])


def test_a_null_address_may_be_passed_and_not_used() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    text = WRITE.format(bytes=0).replace("0x0", "0x8")
    launch(program(text), (1, 1, 1), (64, 1, 1), [None, Pointer(out, "out", writable=True)], wide=False)
    assert out.tolist() == [*range(64)]
    with pytest.raises(MemoryFaultError, match="lie in no buffer"):
        launch(program(WRITE.format(bytes=0)), (1, 1, 1), (64, 1, 1), [None])


def test_arguments_are_packed_as_the_chip_finds_them() -> None:
    """Addresses and sizes in 64 bits; or, as Triton has them, integers and floats in 32."""
    text = """
    s_load_dwordx2 s[4:5], s[0:1], 0x0
    s_load_dword s6, s[0:1], {at}
    v_mov_b32_e32 v1, s6
    v_lshlrev_b32_e32 v2, 2, v0
    global_store_dword v2, v1, s[4:5]
    s_endpgm
    """
    for wide, at, wanted in ((True, 16, 9), (False, 12, 9)):
        out = torch.zeros(64, dtype=torch.int32)
        code = program(text.format(at=at))
        launch(code, (1, 1, 1), (64, 1, 1), [Pointer(out, "out", writable=True), 8, 9], wide=wide)
        assert np.array_equal(out, [wanted] * 64)
