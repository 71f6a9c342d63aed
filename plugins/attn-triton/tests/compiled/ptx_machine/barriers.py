"""Barriers in shared memory, and the copy engine that arrives at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ptx_machine.program import Address, Instruction, Many, Number, Operand

if TYPE_CHECKING:
    from ptx_machine.block import Block, Mask
    from ptx_machine.walking import Step

#: Where descriptors of the copy engine lie, one after the other: no memory that a kernel may read.
DESCRIPTORS: Final = 1 << 46
_ROW: Final = 128


@dataclass(slots=True)
class Barrier:
    """``pending`` arrivals and ``bytes`` until its phase ends."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    #: what those that arrived had seen, where races are looked for
    seen: Any = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass(slots=True)
class Barriers:
    """The barriers of a block, and copies that are under way. ``late``: they land when nobody can do anything else, the
    newest first.
    """

    late: bool
    known: dict[int, Barrier] = field(default_factory=dict)
    under_way: list[Callable[[], None]] = field(default_factory=list)

    def at(self, address: int) -> Barrier:
        found = self.known.get(address)
        assert found is not None, f"no barrier at {address:#x}"
        return found

    def send(self, land: Callable[[], None]) -> None:
        if self.late:
            self.under_way.append(land)
        else:
            land()

    def land_one(self) -> bool:
        """Whether there was a copy to land."""
        if self.under_way:
            self.under_way.pop()()
            return True
        return False


@dataclass(frozen=True, slots=True)
class Boxes:
    """A tensor as the copy engine sees it: bits [rows, columns] in boxes of [box_rows, box_columns], swizzled by 128
    bytes.
    """

    bits: NDArray[np.uint16]
    box: tuple[int, int]

    def read(self, row: int, column: int) -> NDArray[np.uint16]:
        """A box; what lies outside is 0."""
        found = np.zeros(self.box, np.uint16)
        assert row >= 0 <= column, (row, column)
        inside = self.bits[row : row + self.box[0], column : column + self.box[1]]
        found[: inside.shape[0], : inside.shape[1]] = inside
        return found


def single(block: Block, operand: Operand, active: Mask) -> int:
    """The one address that all threads agree on."""
    found = np.unique(block.addresses(operand, active))
    assert len(found) == 1, f"threads disagree on a barrier: {found[:4]}"
    return int(found[0])


def warps_of(active: Mask) -> NDArray[np.intp]:
    """The warps that have active threads."""
    return np.unique(np.flatnonzero(active) // 32)


def try_wait(block: Block, instruction: Instruction, active: Mask) -> bool:
    """Whether the phase that threads wait for has ended; then they are told."""
    done, at, parity = instruction.operands
    barrier = block.barriers.at(single(block, at, active))
    wanted = np.unique(np.broadcast_to(block.read(parity, "u32"), active.shape)[active])
    assert len(wanted) == 1, "threads disagree on a phase"
    if barrier.phase & 1 == int(wanted[0]):
        return False
    block.write(done, np.asarray(True), active)
    if block.shared.races is not None:
        block.shared.races.acquire(warps_of(active), barrier.seen)
    return True


def step_of(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    """Setting up a barrier, and arriving at one."""
    action = parts[1]
    at = next(operand for operand in operands if isinstance(operand, Address))
    number = next((operand.value for operand in operands if isinstance(operand, Number)), 1)

    def init(block: Block, active: Mask) -> None:
        block.barriers.known[single(block, at, active)] = Barrier(number, number)

    def forget(block: Block, active: Mask) -> None:
        block.barriers.known.pop(single(block, at, active), None)

    def arrive(block: Block, active: Mask) -> None:
        barrier = block.barriers.at(single(block, at, active))
        barrier.pending -= int(active.sum()) * (1 if "expect_tx" in parts else number)
        assert barrier.pending >= 0, "more arrivals than the barrier counts"
        if block.shared.races is not None:
            barrier.seen = np.maximum(barrier.seen, block.shared.races.release(warps_of(active)))
        barrier.bytes += number if "expect_tx" in parts else 0
        barrier.settle()

    return {"init": init, "inval": forget, "arrive": arrive}[action]


def box_copy(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    """cp.async.bulk.tensor of a box in two dimensions to shared memory."""
    assert "2d" in parts, parts
    to, source, bar = operands
    assert isinstance(source, Address)
    inner, outer = source.coordinates

    def run(block: Block, active: Mask) -> None:
        boxes = block.descriptors[single(block, source, active) - DESCRIPTORS]
        barrier = block.barriers.at(single(block, bar, active))
        assert inner is not None
        assert outer is not None
        columns, rows = (np.broadcast_to(block.read(o, "s32"), active.shape)[active] for o in (inner, outer))
        races = block.shared.races
        seen = None if races is None else races.clocks[warps_of(active)].max(0)
        for place, row, column in zip(block.addresses(to, active), rows, columns, strict=True):
            block.barriers.send(_landing(block, barrier, boxes.read(int(row), int(column)), int(place), seen))

    return run


def _landing(block: Block, barrier: Barrier, data: NDArray[np.uint16], place: int, seen: Any) -> Callable[[], None]:
    """What puts a box into shared memory, 16 bytes of a row swapped with others of it, and tells the barrier."""
    assert data.shape[1] * 2 == _ROW, "boxes of 128 bytes a row"
    line = place + np.arange(data.shape[0])[:, None] * _ROW
    at = line + ((np.arange(_ROW // 16)[None, :] ^ (line >> 7 & 7)) << 4)
    block.shared.check(at.ravel(), 16)

    def land() -> None:
        races = block.shared.races
        if races is not None:
            barrier.seen = np.maximum(barrier.seen, races.write_box(at.ravel(), 16, seen))
        for i in range(8):
            block.shared.store(at + 2 * i, np.ascontiguousarray(data.reshape(data.shape[0], -1, 8)[:, :, i]))
        barrier.bytes -= data.nbytes
        barrier.settle()

    return land


def elect(operands: tuple[Operand, ...]) -> Step:
    """One thread of each warp."""
    both = operands[0]
    assert isinstance(both, Many)
    chosen = both.parts[1]

    def run(block: Block, active: Mask) -> None:
        lanes = active.reshape(-1, 32)
        first = np.zeros_like(lanes)
        rows = lanes.any(1)
        first[rows, lanes.argmax(1)[rows]] = True
        block.write(chosen, first.reshape(-1), active)

    return run


def descriptor(tensor: torch.Tensor, meta: Any) -> Boxes:
    """What a host descriptor of ``tensor`` says, with the box that the compiler asked for."""
    rows, columns = tensor.shape
    assert meta["elem_size"] == 2, meta
    bits = tensor.view(torch.int16).numpy().view(np.uint16)
    return Boxes(bits.reshape(rows, columns), (int(meta["block_size"][0]), int(meta["block_size"][1])))
