"""The state of one wave of 64 lanes: registers, the mask of its active lanes, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from attn_wave.emulator.memory import ALL, Memory

Lanes = NDArray[Any]
#: Does one instruction to a wave; gives the place to go on at, or None for the next instruction.
Action = Callable[["Wave"], "int | None"]

U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
LOW32: Final = 0xFFFFFFFF
LOW64: Final = 0xFFFFFFFFFFFFFFFF
LANE: Final = np.arange(64)
VCC, EXEC = 106, 126
#: What registers and LDS hold before anything is written: NaN as fp32, as fp16 and as bf16, and no address.
GARBAGE: Final = 0x7FFF7FFF
_POWERS: Final = np.left_shift(np.uint64(1), np.arange(64, dtype=np.uint64))


class Wave:
    """Registers [256, 64] uint32 (vector and accumulation), 128 scalar ones, and what its workgroup shares."""

    __slots__ = ("accumulators", "active", "done", "full", "lds", "memory", "place", "scalar", "scc", "vector")

    def __init__(self, memory: Memory, lds: NDArray[np.uint8]) -> None:
        self.vector = np.full((256, 64), GARBAGE, U32)
        self.accumulators = np.full((256, 64), GARBAGE, U32)
        self.scalar = [GARBAGE] * 128
        self.scc = 0
        self.memory, self.lds = memory, lds
        self.place, self.done = 0, False
        self.set_exec(LOW64)

    def set_exec(self, mask: int) -> None:
        """Makes the lanes of ``mask`` the active ones."""
        self.scalar[EXEC], self.scalar[EXEC + 1] = mask & LOW32, (mask >> 32) & LOW32
        self.full = mask == LOW64
        self.active = ALL if self.full else lanes_of(mask)

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
    """A value of one or of 64 lanes as 64 contiguous lanes."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value if value.flags.c_contiguous else np.ascontiguousarray(value)
    return np.full(64, value)


def signed(value: int, width: int = 32) -> int:
    """The two's complement meaning of ``width`` bits."""
    return value - (1 << width) if value >> (width - 1) & 1 else value
