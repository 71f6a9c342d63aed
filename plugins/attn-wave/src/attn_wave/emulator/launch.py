"""Running a code object on CPU tensors: arguments laid out as the chip finds them, workgroup after workgroup."""

from __future__ import annotations

import struct
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.control import BARRIER
from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.gang import Gang
from attn_wave.emulator.memory import Memory
from attn_wave.emulator.wave import GARBAGE, LOW32, U32, Wave

#: Addresses: the arguments, the code, and a range of its own for each tensor.
_ARGUMENTS: Final = 0x10000
_CODE: Final = 0x1000000
_TENSORS: Final = 1 << 40
#: A kernel of the kit's cases takes thousands: a loop that never ends is stopped.
MAX_INSTRUCTIONS: Final = 20_000_000
#: Workgroups in step: more are slower, since their registers leave the cache.
GANG: Final = 64
#: Rounding to nearest in both places, denormals kept in both: what numpy does.
_FLOAT_MODE: Final = 0xF0
_WORKGROUP_ID_BITS: Final = (0x80, 0x100, 0x200)


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor argument; the kernel gets the address of its first element."""

    tensor: Tensor
    name: str
    writable: bool = False


#: None is the null address
Argument = Pointer | int | float | None
Sizes = tuple[int, int, int]


def launch(
    code: CodeObject,
    grid: Sizes,
    block: Sizes,
    arguments: Sequence[Argument],
    *,
    wide: bool = True,
    dynamic_lds: int = 0,
    backwards: bool = False,
) -> int:
    """Runs every workgroup; returns how many instructions the waves took.

    Integers are passed as 64 bits (``wide``) or 32, floats as fp32, tensors by address. Two arguments on one storage
    share its memory, so that views of one pool are one pool. ``dynamic_lds``: bytes beyond those that the code object
    asks for. ``backwards``: the last wave and workgroup first, which
    must not change a bit. Raises EmulationError, MemoryFaultError.
    """
    if code.float_mode != _FLOAT_MODE:
        raise EmulationError(
            f"{code.name} asks for the float mode {code.float_mode:#x}",
            accepted=f"{_FLOAT_MODE:#x}: rounding to nearest, denormals kept",
        )
    memory = Memory()
    packed = _packed(arguments, memory, wide)
    if len(packed) < code.argument_size:
        raise EmulationError(
            f"{len(packed)} bytes of arguments for {code.name}", accepted=f"{code.argument_size} bytes"
        )
    memory.add(_ARGUMENTS, np.frombuffer(packed + bytes(64), np.uint8), "the arguments", writable=False)
    memory.add(_CODE, code.image, "the code", writable=False)
    with np.errstate(all="ignore"):
        groups = [(x, y, z) for z, y, x in product(range(grid[2]), range(grid[1]), range(grid[0]))]
        if backwards:
            groups.reverse()
        return sum(
            _workgroups(code, memory, groups[first : first + GANG], block, dynamic_lds, backwards)
            for first in range(0, len(groups), GANG)
        )


def _packed(arguments: Sequence[Argument], memory: Memory, wide: bool) -> bytes:
    packed = bytearray()
    ranges: dict[int, tuple[int, bool]] = {}
    writable = {p.tensor.untyped_storage().data_ptr() for p in arguments if isinstance(p, Pointer) and p.writable}
    for argument in arguments:
        if isinstance(argument, Pointer):
            packed += bytes(-len(packed) % 8)
            packed += struct.pack("<Q", _address(argument, memory, ranges, writable))
        elif isinstance(argument, float):
            packed += struct.pack("<f", argument)
        elif argument is None:
            packed += bytes(-len(packed) % 8) + bytes(8)
        else:
            packed += bytes(-len(packed) % 8 if wide else 0)
            packed += struct.pack("<q" if wide else "<i", argument)
    return bytes(packed)


def _address(argument: Pointer, memory: Memory, ranges: dict[int, tuple[int, bool]], writable: set[int]) -> int:
    storage = argument.tensor.untyped_storage()
    if argument.tensor.device.type != "cpu":
        raise EmulationError(f"{argument.name} lies on {argument.tensor.device}", accepted="CPU tensors")
    key = storage.data_ptr()
    if key not in ranges:
        base = _TENSORS * (len(ranges) + 1)
        ranges[key] = base, key in writable
        memory.add(base, _bytes_of(argument.tensor), argument.name, writable=key in writable)
    return ranges[key][0] + int(argument.tensor.storage_offset()) * argument.tensor.element_size()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """All bytes of the storage that ``tensor`` lies in."""
    storage = tensor.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload]
    found: NDArray[np.uint8] = raw.numpy()
    return found


def _workgroups(
    code: CodeObject, memory: Memory, groups: Sequence[Sizes], block: Sizes, dynamic_lds: int, backwards: bool
) -> int:
    """Their waves take turns, from barrier to barrier: the first of every workgroup, then the second of every one."""
    size = code.lds_size + dynamic_lds
    room = -(-size // 16) * 16
    lds = np.full(len(groups) * room // 4, GARBAGE, U32).view(np.uint8)
    firsts = range(0, block[0] * block[1] * block[2], 64)
    turns = [
        [
            _wave(code, Wave(memory, lds, i * room, size, code.rows, code.scratch_size), group, block, first)
            for i, group in enumerate(groups)
        ]
        for first in (reversed(firsts) if backwards else firsts)
    ]
    total = 0
    while any(turns):
        for waves in turns:
            total += run_to_barrier(code, waves)
        turns = [[wave for wave in waves if not wave.done] for waves in turns]
    return total


def _wave(code: CodeObject, wave: Wave, group: Sizes, block: Sizes, first: int) -> Wave:
    """``wave`` as it begins."""
    count = min(64, block[0] * block[1] * block[2] - first)
    wave.set_exec((1 << count) - 1)
    wave.scalar[0], wave.scalar[1] = _ARGUMENTS & LOW32, _ARGUMENTS >> 32
    at = code.setup >> 1 & 0x1F
    for bit, number in zip(_WORKGROUP_ID_BITS, group, strict=True):
        if code.setup & bit:
            wave.scalar[at] = number
            at += 1
    thread = np.arange(first, first + 64)
    x, y, z = thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])
    wave.vector[0] = (z << 20 | y << 10 | x).astype(U32)
    wave.place = code.places[code.entry]
    return wave


def run_to_barrier(code: CodeObject, waves: Sequence[Wave]) -> int:
    """Runs waves of different workgroups to a barrier or their end; returns how many instructions they took.

    Those at one place go on in step. Where they part, those that are behind go first, until they are where others are.
    """
    behind: dict[int, list[Wave]] = {}
    for wave in waves:
        behind.setdefault(wave.place, []).append(wave)
    total = 0
    gang: Wave | None = None
    while behind:
        place = min(behind)
        here = behind.pop(place)
        if gang is None or list(gang.waves) != here:
            gang = here[0] if len(here) == 1 else Gang(here)
        total += _in_step(code, gang, place, behind)
        for wave in here:
            if wave.place >= 0:
                behind.setdefault(wave.place, []).append(wave)
            else:
                wave.place = ~wave.place
    return total


def _in_step(code: CodeObject, gang: Wave, place: int, others: Container[int]) -> int:
    """Runs ``gang`` from ``place`` until its waves part, are where others are, wait or end: their place is inverted."""
    actions, in_step, waves, count = code.actions, code.in_step, gang.waves, 0
    try:
        while count < MAX_INSTRUCTIONS:
            count += 1
            action = actions[place] or code.action(place)
            if not isinstance(gang, Gang) or in_step[place]:
                goes_to = action(gang)
            else:
                to = [action(wave) for wave in waves]
                if code.switches_lanes[place]:
                    gang.follow()
                goes_to = to[0]
                if to.count(goes_to) != len(to):
                    for wave, there in zip(waves, to, strict=True):
                        wave.place = place + 1 if there is None else there
                    return count * len(waves)
            if goes_to is None:
                place += 1
            elif goes_to >= 0:
                place = goes_to
            else:
                for wave in waves:
                    wave.place = ~(place + (goes_to == BARRIER))
                return count * len(waves)
            if place in others:
                for wave in waves:
                    wave.place = place
                return count * len(waves)
    except (ValueError, IndexError, OverflowError) as error:
        raise EmulationError(f"{code.name}: {code.instructions[place].text}: {error!r}") from error
    raise EmulationError(f"{code.name}: more than {MAX_INSTRUCTIONS} instructions in one wave")
