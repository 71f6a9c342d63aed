"""A wave to try single instructions on: registers set by name, then read by name."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from attn_wave.emulator.code_object import action_of
from attn_wave.emulator.instructions import operand, parse
from attn_wave.emulator.memory import Memory
from attn_wave.emulator.wave import U32, Wave

#: The number of each lane.
LANE = np.arange(64)
LOW32 = 0xFFFFFFFF
#: Where the buffers of `wave_of` lie.
READ_ONLY, WRITABLE = 1 << 40, 2 << 40


def f32(*values: float) -> Any:
    """The bits of fp32 numbers."""
    bits = [struct.unpack("<I", struct.pack("<f", v))[0] for v in values]
    return bits[0] if len(bits) == 1 else np.array(bits, np.uint32)


def f16(value: float) -> int:
    """The bits of an fp16 number."""
    return int(struct.unpack("<H", struct.pack("<e", value))[0])


def lanes(function: Any) -> Any:
    """uint32 [64] of a function of the lane's number."""
    return np.array([int(function(lane)) & LOW32 for lane in range(64)], np.uint32)


def wave_of(registers: Mapping[str, Any], *, lds: int = 1024, scratch: int = 32) -> Wave:
    """A wave whose ``registers`` hold these: v3, a3 (one value or 64), s3, vcc (64 bits), exec, scc.

    Its memory has 1024 bytes at READ_ONLY, byte i of which is i % 251, and as many zeros at WRITABLE; its LDS likewise.
    Each lane has ``scratch`` bytes for itself, with garbage in them.
    """
    memory = Memory()
    numbers = (np.arange(1024) % 251).astype(np.uint8)
    memory.add(READ_ONLY, numbers.copy(), "numbers", writable=False)
    memory.add(WRITABLE, np.zeros(1024, np.uint8), "zeros", writable=True)
    wave = Wave(memory, np.resize(numbers, lds).astype(np.uint8), scratch=scratch)
    for name, value in registers.items():
        if name == "scc":
            wave.scc = int(value)
        elif name == "exec":
            wave.set_exec(int(value))
        elif name[0] in "va" and name != "vcc":
            rows = wave.vector if name[0] == "v" else wave.accumulators
            rows[int(name[1:])] = np.asarray(value).astype(np.int64).astype(U32)
        else:
            _set_scalar(wave, name, int(value))
    return wave


def _set_scalar(wave: Wave, name: str, value: int) -> None:
    op = operand(name)
    for i in range(op.count):
        wave.scalar[op.index + i] = value >> 32 * i & LOW32


def held(wave: Wave, name: str) -> Any:
    """What a register holds: [64] uint32 of v3 or a3, an integer of s3, s[2:3], vcc, exec and scc."""
    if name == "scc":
        return wave.scc
    if name[0] in "va" and name != "vcc":
        return (wave.vector if name[0] == "v" else wave.accumulators)[int(name[1:])]
    op = operand(name)
    return sum(wave.scalar[op.index + i] << 32 * i for i in range(op.count))


def run(text: str, registers: Mapping[str, Any]) -> Wave:
    """The wave after one instruction."""
    wave = wave_of(registers)
    with np.errstate(all="ignore"):
        action_of(parse(text))(wave)
    return wave


def check(text: str, registers: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Every register of ``expected`` holds, after the instruction, what is said there."""
    wave = run(text, registers)
    for name, value in expected.items():
        found = held(wave, name)
        if isinstance(found, np.ndarray):
            wanted = np.broadcast_to(np.asarray(value).astype(np.int64).astype(np.uint32), 64)
            np.testing.assert_array_equal(found, wanted, err_msg=f"{text}: {name}")
        else:
            assert found == value, f"{text}: {name} is {found:#x}, not {value:#x}"
