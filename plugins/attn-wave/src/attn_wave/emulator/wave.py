"""The state of one wave of 64 lanes: registers, the mask of its active lanes, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from attn_wave.emulator.memory import Memory, all_lanes

Lanes = NDArray[Any]
#: Does one instruction to a wave; gives the place to go on at, or None for the next instruction.
Action = Callable[["Wave"], "int | None"]

U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
LOW32: Final = 0xFFFFFFFF
LOW64: Final = 0xFFFFFFFFFFFFFFFF
LANE: Final = np.arange(64)
VCC, EXEC = 106, 126
#: What registers, LDS and scratch hold before anything is written: NaN as fp32, as fp16 and as bf16, and no address.
GARBAGE: Final = 0x7FFF7FFF
_POWERS: Final = np.left_shift(np.uint64(1), np.arange(64, dtype=np.uint64))


class Wave:
    """Registers [256, 64] uint32 (vector and accumulation), 128 scalar ones, and what its workgroup shares.

    What vector instructions use of it a `Gang` of several waves has too.
    """

    __slots__ = (
        "accumulators", "active", "done", "first_lanes", "full", "lanes", "lds", "lds_first", "lds_size", "memory",
        "place", "scalar", "scc", "scratch", "vector",
    )  # fmt: skip

    def __init__(
        self,
        memory: Memory,
        lds: Lanes,
        lds_first: Any = 0,
        lds_size: int | None = None,
        rows: tuple[int, int] = (256, 256),
        scratch: int = 0,
    ) -> None:
        """``lds`` from ``lds_first`` on, ``lds_size`` bytes, is that of its workgroup. ``rows``: vector registers.
        ``scratch``: bytes that each lane has for itself."""
        self.vector, self.accumulators, self.scratch = (
            np.full((n, 64), GARBAGE, U32) for n in (*rows, -(-scratch // 4))
        )
        self.scalar = [GARBAGE] * 128
        self.scc = 0
        self.memory, self.lds, self.lds_first = memory, lds, lds_first
        self.lds_size = lds.size if lds_size is None else lds_size
        #: how many lanes there are, and for each the number of the first lane of its wave
        self.lanes = 64
        self.first_lanes: Any = 0
        self.place, self.done = 0, False
        self.set_exec(LOW64)

    @property
    def waves(self) -> Sequence[Wave]:
        return (self,)

    def scalar_lanes(self, index: int) -> Any:
        """A scalar register as vector instructions read it."""
        return U32(self.scalar[index])

    def scalar_lanes64(self, read: Callable[[Wave], int]) -> Any:
        """What ``read`` finds in a wave, in 64 bits."""
        return U64(read(self))

    def masks(self, read: Callable[[Wave], int]) -> Lanes:
        """[lanes] bool of the mask that ``read`` finds in a wave."""
        return lanes_of(read(self))

    def set_masks(self, write: Callable[[Wave, int], None], lanes: Lanes) -> None:
        """Writes [lanes] bool as the mask of a wave."""
        write(self, mask_of(lanes))

    def spread(self, value: Any) -> Lanes:
        """A value of all lanes or of each as one for each."""
        value = spread(value)
        return value if value.size == 64 else np.repeat(value, 64)

    def across(self, where: Lanes) -> Lanes:
        """The lanes ``where`` [64] of a wave, for each lane."""
        return where

    def each(self, lanes: Lanes) -> Lanes:
        """What is said of the 64 lanes of a wave, for each lane."""
        return lanes

    def set_exec(self, mask: int) -> None:
        """Makes the lanes of ``mask`` the active ones."""
        self.scalar[EXEC], self.scalar[EXEC + 1] = mask & LOW32, (mask >> 32) & LOW32
        self.full = mask == LOW64
        self.active = all_lanes(64) if self.full else lanes_of(mask)

    @property
    def exec_mask(self) -> int:
        return self.scalar[EXEC] | self.scalar[EXEC + 1] << 32


@lru_cache(8192)
def lanes_of(mask: int) -> NDArray[np.bool_]:
    """[64] bool, read-only: the lanes whose bit is set."""
    found: NDArray[np.bool_] = (_POWERS & U64(mask)) != 0
    found.setflags(write=False)
    return found


def mask_of(lanes: Lanes) -> int:
    """The 64-bit mask of the lanes that are true."""
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


def spread(value: Any) -> Lanes:
    """A value of all lanes as an array of one, values of each as a contiguous array."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value if value.flags.c_contiguous else np.ascontiguousarray(value)
    return np.full(1, value)


def signed(value: int, width: int = 32) -> int:
    """The two's complement meaning of ``width`` bits."""
    return value - (1 << width) if value >> (width - 1) & 1 else value
