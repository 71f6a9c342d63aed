"""Running a code object on CPU tensors: arguments laid out as the chip finds them, workgroup after workgroup."""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
from attn_wave.emulator.memory import Memory
from attn_wave.emulator.wave import GARBAGE, LOW32, U32, Wave

#: Addresses: the arguments, the code, and a range of its own for each tensor.
_ARGUMENTS: Final = 0x10000
_CODE: Final = 0x1000000
_TENSORS: Final = 1 << 40
#: A kernel of the kit's cases takes thousands: a loop that never ends is stopped.
MAX_INSTRUCTIONS: Final = 20_000_000
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
        groups = list(product(range(grid[2]), range(grid[1]), range(grid[0])))
        order = reversed(groups) if backwards else groups
        return sum(_workgroup(code, memory, (x, y, z), block, dynamic_lds, backwards) for z, y, x in order)


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


def _workgroup(code: CodeObject, memory: Memory, group: Sizes, block: Sizes, dynamic_lds: int, backwards: bool) -> int:
    """Its waves take turns, each from barrier to barrier."""
    threads = block[0] * block[1] * block[2]
    size = code.lds_size + dynamic_lds
    lds = np.full((size + 3) // 4, GARBAGE, U32).view(np.uint8)[:size]
    waves = [_wave(code, memory, lds, group, block, first) for first in range(0, threads, 64)]
    if backwards:
        waves.reverse()
    total = 0
    while waves:
        for wave in waves:
            total += _to_barrier(code, wave)
        waves = [wave for wave in waves if not wave.done]
    return total


def _wave(code: CodeObject, memory: Memory, lds: NDArray[np.uint8], group: Sizes, block: Sizes, first: int) -> Wave:
    wave = Wave(memory, lds)
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


def _to_barrier(code: CodeObject, wave: Wave) -> int:
    place, actions, count = wave.place, code.actions, 0
    try:
        while count < MAX_INSTRUCTIONS:
            count += 1
            goes_to = (actions[place] or code.action(place))(wave)
            if goes_to is None:
                place += 1
            elif goes_to >= 0:
                place = goes_to
            else:
                wave.place = place + (goes_to == BARRIER)
                return count
    except (ValueError, IndexError, OverflowError) as error:
        raise EmulationError(f"{code.name}: {code.instructions[place].text}: {error!r}") from error
    raise EmulationError(f"{code.name}: more than {MAX_INSTRUCTIONS} instructions in one wave")
