"""The machine that runs PTX: small programs with right answers, and programs with one fault that it must find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ptx_machine.arithmetic import operation, to_bf16
from ptx_machine.machine import Machine
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import parse
from ptx_machine.walking import MachineError

HEAD = """
.visible .entry probe(.param .u64 probe_param_0)
.reqntid 64
{
 .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
 ld.param.b64 %rd1, [probe_param_0];
 mov.u32 %r1, %tid.x;
 mul.wide.u32 %rd2, %r1, 4;
 add.s64 %rd3, %rd1, %rd2;
 shl.b32 %r2, %r1, 2;
 mov.b32 %r3, global_smem;
 add.s32 %r4, %r3, %r2;
"""
TAIL = """
 ret;
 // -- End function
}
"""


def run(body: str, shared: int = 256, *, late: bool = False) -> torch.Tensor:
    """What 64 threads store to 64 numbers, which hold 0, 10, 20, ... before."""
    numbers = torch.arange(0, 640, 10, dtype=torch.int32)
    lines = body.replace(";", ";\n")
    Machine(parse(HEAD + lines + TAIL, shared), late=late).run((1, 1), [numbers.data_ptr()], GlobalMemory([numbers]))
    return numbers


def test_threads_part_and_meet() -> None:
    found = run("""
     and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 1; mov.b32 %r6, 7; @%p1 bra $ODD; mov.b32 %r6, 5;
$ODD:
     st.global.b32 [%rd3], %r6;""")
    assert found.tolist() == [5, 7] * 32


def test_what_one_warp_stores_another_reads_after_a_barrier() -> None:
    found = run("""
     st.shared.b32 [%r4], %r1; bar.sync 0; xor.b32 %r5, %r2, 128; add.s32 %r6, %r3, %r5;
     ld.shared.b32 %r7, [%r6]; st.global.b32 [%rd3], %r7;""")
    assert found.tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.shared.b32 %r5, [%r4+4];", "4 bytes at 0x500 of shared memory"),
        ("ld.global.b32 %r5, [%rd3+4];", "of global memory"),
        ("ld.shared.v2.b32 {%r5, %r6}, [%r4];", "not aligned"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra $WAIT; ret;\n$WAIT:\n bar.sync 1, 64;", "all threads wait"),
        ("$AGAIN:\n bra.uni $AGAIN;", "no end"),
        ("frobnicate.b32 %r5, %r6;", "not known here"),
    ],
)  # fmt: skip
def test_a_fault_is_found(body: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx_machine.walking.MOST_STEPS", 5_000)
    with pytest.raises(MachineError, match=said):
        run(body)


EXCHANGE = "st.shared.b32 [%r4], %r1; {} xor.b32 %r5, %r2, 128; add.s32 %r6, %r3, %r5; ld.shared.b32 %r7, [%r6];"


def test_what_another_warp_wrote_is_read_after_a_barrier_only() -> None:
    run(EXCHANGE.format("bar.sync 0;"), late=True)
    run(EXCHANGE.format("").replace("128", "4"), late=True)  # a warp reads its own
    with pytest.raises(MachineError, match=r"reads what warp 1 .* wrote, byte 128"):
        run(EXCHANGE.format(""), late=True)


def test_what_another_warp_reads_is_written_after_a_barrier_only() -> None:
    again = EXCHANGE.format("bar.sync 0;") + "{} st.shared.b32 [%r4], %r2;"
    run(again.replace("{}", "bar.sync 0;"), late=True)
    with pytest.raises(MachineError, match=r"writes what warp 1 .* reads"):
        run(again.replace("{}", ""), late=True)


COPY = "cp.async.ca.shared.global [%r4], [%rd3], 0x4; cp.async.commit_group;"
USE = "ld.shared.b32 %r5, [%r4]; add.s32 %r5, %r5, 1; st.global.b32 [%rd3], %r5;"


@pytest.mark.parametrize("late", [False, True])
def test_a_copy_that_is_waited_for_is_there(late: bool) -> None:
    assert run(f"{COPY} cp.async.wait_group 0; {USE}", late=late).tolist() == list(range(1, 641, 10))


def test_a_copy_that_nobody_waits_for_is_not_there_when_it_is_late() -> None:
    """What the interpreter of Triton cannot see, and a GPU shows now and then."""
    assert run(f"{COPY} {USE}").tolist() == list(range(1, 641, 10))
    assert run(f"{COPY} {USE}", late=True).tolist() == [0] * 64  # the pattern of memory that nobody filled, plus 1


def test_a_barrier_of_phases_lets_through_when_all_have_arrived() -> None:
    found = run(
        """
     setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r3], 32; bar.sync 0;
     setp.lt.u32 %p2, %r1, 32; @%p2 bra $FIRST;
     st.shared.b32 [%r4], %r1; mbarrier.arrive.shared::cta.b64 _, [%r3]; ret;
$FIRST:
     { .reg .pred complete;
waitLoop:
     mbarrier.try_wait.parity.shared.b64 complete, [%r3], 0; @!complete bra.uni waitLoop; }
     ld.shared.b32 %r7, [%r4+128]; st.global.b32 [%rd3], %r7;""",
        shared=512,
    )
    assert found.tolist() == [*range(32, 64), *range(320, 640, 10)]


def test_arithmetic_is_that_of_the_hardware() -> None:
    def apply(opcode: str, *values: Any) -> NDArray[Any]:
        return np.asarray(operation(tuple(opcode.split(".")))[0](*values))

    word = np.array([0x12345678], np.uint32)
    assert apply("prmt.b32", word, np.array([0x9ABCDEF0], np.uint32), np.uint32(0x7610)).tolist() == [0x9ABC5678]
    assert apply("lop3.b32", word, ~word, word, np.array(0x96)).tolist() == [int(~word[0] & 0xFFFFFFFF) ^ 0]
    assert apply("div.s32", np.array([-7], np.int32), np.array([2], np.int32)).tolist() == [-3]
    assert apply("rem.s32", np.array([-7, 7], np.int32), np.array([2, -2], np.int32)).tolist() == [-1, 1]
    assert apply("shr.u32", word, np.array([40], np.uint32)).tolist() == [0]
    numbers = torch.randn(4096)
    assert torch.equal(
        torch.from_numpy(to_bf16(numbers.numpy()).view(np.int16)), numbers.to(torch.bfloat16).view(torch.int16)
    )
