"""Which accesses of a block's shared memory nothing orders: vector clocks of warps, for every byte.

A warp's own accesses are in order. A barrier orders what came before it, in all that arrive, before what comes after.
An arrival at a barrier of phases is ordered before whoever waits for the phase; a box of the copy engine is written
after what the warp that asked for it had seen, and before whoever waits for its bytes. What a warp stored, tensor cores
and copy engine see only behind a fence of that warp.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Clock = NDArray[np.int32]


class RaceError(Exception):
    """Two accesses of one byte, one of them a write, that nothing orders."""


class Races:
    """Clocks of ``warps`` warps and of the copy engine (the last one), and who touched each of ``size`` bytes from
    ``base`` on.
    """

    def __init__(self, warps: int, base: int, size: int) -> None:
        self._base, self.engine = base, warps
        self.clocks: NDArray[np.int32] = np.zeros((warps + 1, warps + 1), np.int32)
        np.fill_diagonal(self.clocks, 1)
        self._writer = np.full(size, -1, np.int16)
        self._written = np.zeros(size, np.int32)
        self._read = np.zeros((size, warps + 1), np.int32)
        #: stored by a warp that has not fenced since
        self._unfenced = np.zeros(size, np.bool_)
        #: what each warp is at, for the message of a race
        self.where: list[str] = [""] * (warps + 1)

    def meet(self, warps: NDArray[np.intp]) -> None:
        """All of these wait for each other."""
        self.clocks[warps] = self.clocks[warps].max(0)
        self.clocks[warps, warps] += 1

    def release(self, warps: NDArray[np.intp]) -> Clock:
        """What these warps have seen, for whoever acquires it; what they do from now on is later."""
        seen: Clock = self.clocks[warps].max(0)
        self.clocks[warps, warps] += 1
        return seen

    def acquire(self, warps: NDArray[np.intp], seen: Clock) -> None:
        self.clocks[warps] = np.maximum(self.clocks[warps], seen)

    def read(self, addresses: NDArray[np.int64], width: int, warps: NDArray[np.intp]) -> None:
        """``warps`` [n] read ``width`` bytes at ``addresses`` [n]. Raises RaceError."""
        at, by = self._bytes(addresses, width, warps)
        self._check(at, by, "reads what")
        self._read[at, by] = self.clocks[by, by]

    def fence(self, warps: NDArray[np.intp]) -> None:
        """What these warps have stored, tensor cores and copy engine may see."""
        self._unfenced &= ~np.isin(self._writer, warps)

    def read_fenced(self, addresses: NDArray[np.int64], width: int, warp: int) -> None:
        """Tensor cores read for ``warp``, beside `read`. Raises RaceError."""
        self._check_fenced(*self._bytes(addresses, width, np.full(len(addresses), warp, np.intp)))

    def write(
        self,
        addresses: NDArray[np.int64],
        width: int,
        warps: NDArray[np.intp],
        changes: NDArray[np.bool_],
        *,
        stored: bool = False,
    ) -> None:
        """The same of writes; where one ``changes`` nothing, another may write the same. ``stored``: by an instruction
        whose writes need a fence. Raises RaceError.
        """
        at, by = self._bytes(addresses, width, warps)
        same = ~np.repeat(changes, width) & self._unordered(at, by)
        at, by = at[~same], by[~same]
        self._check(at, by, "writes over what")
        late = self._read[at] > self.clocks[by]
        late[np.arange(len(by)), by] = False
        if late.any():
            i, other = (int(found[0]) for found in np.nonzero(late))
            raise RaceError(self._message(int(at[i]), int(by[i]), other, "writes what", "reads"))
        self._writer[at], self._written[at] = by, self.clocks[by, by]
        self._read[at] = 0
        self._unfenced[at] = stored

    def write_box(self, addresses: NDArray[np.int64], width: int, seen: Clock) -> Clock:
        """The copy engine writes, after ``seen``; what a waiter acquires. Raises RaceError."""
        own = self.clocks[self.engine]
        own[:] = np.maximum(seen, np.where(np.arange(len(own)) == self.engine, own, 0))
        own[self.engine] += 1
        engine = np.full(len(addresses), self.engine, np.intp)
        self._check_fenced(*self._bytes(addresses, width, engine))
        self.write(addresses, width, engine, np.ones(len(addresses), np.bool_))
        copied: Clock = own.copy()
        return copied

    def _bytes(
        self, addresses: NDArray[np.int64], width: int, warps: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        at = (addresses[:, None] - self._base + np.arange(width)).ravel()
        return at, np.repeat(warps, width)

    def _unordered(self, at: NDArray[np.int64], by: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Where somebody else wrote, and nothing says that this was before."""
        writer = self._writer[at]
        seen = self.clocks[by, np.maximum(writer, 0)]
        return np.asarray((writer >= 0) & (writer != by) & (self._written[at] > seen))

    def _check(self, at: NDArray[np.int64], by: NDArray[np.intp], said: str) -> None:
        late = self._unordered(at, by)
        if late.any():
            i = int(np.flatnonzero(late)[0])
            raise RaceError(self._message(int(at[i]), int(by[i]), int(self._writer[at[i]]), said, "wrote"))

    def _check_fenced(self, at: NDArray[np.int64], by: NDArray[np.intp]) -> None:
        bare = self._unfenced[at]
        if bare.any():
            i = int(np.flatnonzero(bare)[0])
            said = "gives the engines, with no fence, what"
            raise RaceError(self._message(int(at[i]), int(by[i]), int(self._writer[at[i]]), said, "stored"))

    def _message(self, at: int, one: int, other: int, said: str, did: str) -> str:
        names = [f"warp {w}" if w < self.engine else "the copy engine" for w in (one, other)]
        first, second = (f"{name} at {self.where[w]}" for name, w in zip(names, (one, other), strict=True))
        return f"{first} {said} {second} {did}, byte {at} of shared memory"
