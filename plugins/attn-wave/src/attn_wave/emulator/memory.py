"""Device memory: the buffers of a launch, each at an address of its own, every access held to one of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from attn_wave.emulator.faults import MemoryFaultError


@cache
def all_lanes(count: int) -> NDArray[np.bool_]:
    """[count] true, read-only: lanes of which none is switched off. Always the same array."""
    found = np.ones(count, bool)
    found.setflags(write=False)
    return found


#: A type of so many bytes, and which power of two that is.
_UNITS: Final = {1: (np.uint8, 0), 2: (np.uint16, 1), 4: (np.uint32, 2), 8: (np.uint64, 3), 16: (np.complex128, 4)}
_BYTES: Final = {size: np.arange(size) for size in (1, 2, 4, 8, 12, 16)}


def read_bytes(data: NDArray[np.uint8], start: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """[n, size] bytes of ``data`` at each of ``start`` [n], all of which lie inside; quickest at multiples of size."""
    if size not in _UNITS or (start & (size - 1)).any():
        found: NDArray[np.uint8] = data[start[:, None] + _BYTES[size]]
        return found
    unit, power = _UNITS[size]
    units: NDArray[Any] = data[: data.size >> power << power].view(unit)
    return units.take(start >> power).view(np.uint8).reshape(-1, size)


def write_bytes(data: NDArray[np.uint8], start: NDArray[np.int64], given: NDArray[np.uint8]) -> None:
    """Puts ``given`` [n, size] at each of ``start`` [n], all inside; of two at one place the later stays."""
    data[start[:, None] + _BYTES[given.shape[1]]] = given


@dataclass(slots=True, eq=False)
class Buffer:
    """``data`` [bytes] uint8 at the addresses from ``base`` on."""

    base: int
    data: NDArray[np.uint8]
    name: str
    writable: bool

    @property
    def end(self) -> int:
        return self.base + self.data.size


class Memory:
    """All buffers. Far apart, so that a wrong index leaves its own buffer rather than reach another's."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._latest: Buffer | None = None

    def add(self, base: int, data: NDArray[np.uint8], name: str, *, writable: bool) -> None:
        """One more buffer."""
        self.buffers.append(Buffer(base, data, name, writable))

    def find(self, address: int, size: int, what: str) -> Buffer:
        """The buffer that holds all of ``size`` bytes at ``address``. Raises MemoryFaultError."""
        latest = self._latest
        if latest is not None and latest.base <= address and address + size <= latest.end:
            return latest
        for buffer in self.buffers:
            if buffer.base <= address and address + size <= buffer.end:
                self._latest = buffer
                return buffer
        near = min(self.buffers, key=lambda b: min(abs(address - b.base), abs(address - b.end)))
        raise MemoryFaultError(
            f"{what}: {size} bytes at {address:#x} lie in no buffer; nearest is {near.name} of {near.data.size} bytes,"
            f" {address - near.base} bytes from its start",
            given=address,
            accepted="addresses inside the tensors of the launch",
        )

    def load(self, addresses: NDArray[Any], size: int, active: NDArray[np.bool_], what: str) -> NDArray[np.uint8]:
        """[lanes, size] bytes, those of the active lanes read at their ``addresses``."""
        if active is all_lanes(active.size):
            lowest = int(addresses.min())
            buffer = self.find(lowest, size, what)
            if int(addresses.max()) + size <= buffer.end:
                return read_bytes(buffer.data, (addresses - np.uint64(buffer.base)).view(np.int64), size)
        out = np.zeros((active.size, size), np.uint8)
        for lanes, buffer in self._groups(addresses, size, active, what):
            out[lanes] = read_bytes(buffer.data, (addresses[lanes] - np.uint64(buffer.base)).view(np.int64), size)
        return out

    def store(self, addresses: NDArray[Any], data: NDArray[np.uint8], active: NDArray[np.bool_], what: str) -> None:
        """Writes ``data`` [lanes, size] of the active lanes. Raises MemoryFaultError, also for what is only read."""
        size = data.shape[1]
        for lanes, buffer in self._groups(addresses, size, active, what):
            if not buffer.writable:
                raise MemoryFaultError(f"{what} writes to {buffer.name}, which is only read", given=buffer.name)
            write_bytes(buffer.data, (addresses[lanes] - np.uint64(buffer.base)).view(np.int64), data[lanes])

    def _groups(
        self, addresses: NDArray[Any], size: int, active: NDArray[np.bool_], what: str
    ) -> list[tuple[NDArray[np.int64], Buffer]]:
        """The active lanes by the buffer they are in: nearly always one, found by its lowest and highest address."""
        lanes = np.flatnonzero(active)
        groups = []
        while lanes.size:
            here = addresses[lanes]
            lowest = int(here.min())
            buffer = self.find(lowest, size, what)
            if int(here.max()) + size <= buffer.end:
                groups.append((lanes, buffer))
                break
            inside = here + np.uint64(size) <= np.uint64(buffer.end)
            groups.append((lanes[inside], buffer))
            lanes = lanes[~inside]
        return groups
