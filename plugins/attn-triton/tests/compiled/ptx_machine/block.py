"""One block while it runs: its registers, its shared memory, and what is under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx_machine.arithmetic import TYPES
from ptx_machine.barriers import DESCRIPTORS, Barriers, Boxes
from ptx_machine.memory import SHARED_BASE, GlobalMemory, SharedMemory
from ptx_machine.program import Address, Number, Operand, Register

Values = NDArray[Any]
Mask = NDArray[np.bool_]


@dataclass(slots=True)
class Copy:
    """cp.async that is under way: bytes [threads, size] to shared addresses."""

    at: Values
    data: Values
    warps: NDArray[np.intp]


@dataclass(slots=True)
class Product:
    """wgmma that is under way, of one warpgroup."""

    finish: Callable[[], None]


@dataclass(slots=True)
class Queue:
    """Asynchronous work in groups, as one of the two kinds of it is committed and waited for."""

    open: list[Any] = field(default_factory=list)
    groups: list[list[Any]] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> list[Any]:
        """What has to be finished so that at most ``pending`` groups are under way."""
        count = max(0, len(self.groups) - pending)
        done, self.groups = self.groups[:count], self.groups[count:]
        return [work for group in done for work in group]


@dataclass(slots=True)
class Block:
    """One block: registers of all threads, its shared memory, and what is under way."""

    registers: dict[str, Values]
    memory: GlobalMemory
    shared: SharedMemory
    #: the bits of the arguments; a descriptor's are its place among ``descriptors``
    params: Sequence[int]
    descriptors: Sequence[Boxes]
    late: bool
    barriers: Barriers
    copies: Queue = field(default_factory=Queue)
    products: dict[int, Queue] = field(default_factory=dict)

    def read(self, operand: Operand, kind: str) -> Values:
        dtype = TYPES[kind]
        if isinstance(operand, Number):
            width = np.dtype(dtype).itemsize * 8
            if kind == "pred":
                return np.asarray(bool(operand.value))
            return np.asarray(operand.value % (1 << width), f"u{width // 8}").view(dtype)
        assert isinstance(operand, Register), operand
        if operand.name == "global_smem":
            return np.asarray(SHARED_BASE, dtype)
        if "_param_" in operand.name:  # the address of an argument, which only descriptors are asked for
            index = self.params[int(operand.name.rpartition("_")[2])]
            return np.asarray(DESCRIPTORS + index, dtype)
        value = self.registers[operand.name]
        return value if value.dtype == dtype else value.view(dtype)

    def write(self, operand: Operand | None, values: Values, active: Mask) -> None:
        if operand is None:
            return
        assert isinstance(operand, Register), operand
        own = self.registers[operand.name]
        bits = values if values.dtype == own.dtype else _as_bits(values, own.dtype)
        own[active] = bits[active] if bits.shape else bits

    def addresses(self, operand: Operand, active: Mask) -> NDArray[np.int64]:
        assert isinstance(operand, Address), operand
        wide = "u64"
        if isinstance(operand.base, Register):
            name = operand.base.name
            wide = "u32" if name == "global_smem" or self.registers[name].dtype == np.uint32 else "u64"
        base = self.read(operand.base, wide).astype(np.int64) + operand.offset
        return np.broadcast_to(base, active.shape)[active]


def _as_bits(values: Values, dtype: Any) -> Values:
    """Values of another type in a register's own: the same bits, or fewer or more of them."""
    if values.dtype.itemsize != np.dtype(dtype).itemsize:
        return np.asarray(values.astype(dtype))
    return np.asarray(np.ascontiguousarray(values)).view(dtype) if values.shape else np.asarray(values).view(dtype)
