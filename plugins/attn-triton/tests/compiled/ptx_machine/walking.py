"""Where the threads of a block are: together, apart where branches part them, or waiting for a barrier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ptx_machine.barriers import try_wait, warps_of
from ptx_machine.memory import MemoryAccessError
from ptx_machine.program import Instruction, Number
from ptx_machine.races import RaceError

if TYPE_CHECKING:
    from ptx_machine.block import Block

Mask = NDArray[np.bool_]
Step = Callable[["Block", Mask], None]
#: More instructions than any test needs: a loop that does not end.
MOST_STEPS: Final = 3_000_000
#: What moves threads, rather than computes.
MOVES: Final = ("bra", "brx", "ret", "exit", "bar", "barrier", "mbarrier")


class MachineError(Exception):
    """What went wrong, and at which instruction."""


def moves(instruction: Instruction) -> bool:
    """Whether it is for `Walk` to do. Barriers of one warp are nothing here: a warp's threads go together."""
    if instruction.parts[0] == "mbarrier":
        return instruction.parts[1] == "try_wait"
    return instruction.parts[0] in MOVES and instruction.parts[1:2] != ("warp",)


@dataclass(slots=True)
class Group:
    """Threads that are at one place."""

    pc: int
    active: Mask


class Walk:
    """Takes all threads through a program. Those furthest behind go first, so that they meet again after a branch."""

    def __init__(self, instructions: Sequence[Instruction], steps: Sequence[Step | None], block: Block) -> None:
        self._instructions, self._steps, self._block = instructions, steps, block
        self._count = len(block.registers["%tid.x"])
        self._ready = [Group(0, np.ones(self._count, np.bool_))]
        self._watching: list[Group] = []
        self._arrived: dict[int, list[Group]] = {}
        self._left = self._count

    def run(self) -> None:
        """Raises MachineError, also where threads wait for what never comes."""
        steps = 0
        while self._ready or self._watching or self._arrived:
            self._wake()
            self._ready.sort(key=lambda group: group.pc)
            group = self._ready.pop(0)
            while self._ready and self._ready[0].pc == group.pc:
                group.active = group.active | self._ready.pop(0).active
            steps += self._stretch(group, self._ready[0].pc if self._ready else len(self._instructions))
            if steps > MOST_STEPS:
                raise MachineError(f"{self._instructions[group.pc]}: no end after {steps} steps")

    def _wake(self) -> None:
        """Those whose barrier has come are ready; if nobody is, what is under way arrives."""
        while True:
            still: list[Group] = []
            for group in self._watching:
                (self._ready if try_wait(self._block, self._instructions[group.pc], group.active) else still).append(
                    group
                )
            for group in self._watching:
                if not any(group is other for other in still):
                    group.pc += 1
            self._watching = still
            if self._ready:
                return
            try:
                landed = self._block.barriers.land_one()
            except RaceError as fault:
                raise MachineError(str(fault)) from fault
            if not landed:
                stuck = [str(self._instructions[group.pc]) for group in self._watching]
                stuck += [
                    f"barrier {name}: {[(str(self._instructions[g.pc - 1]), int(g.active.sum())) for g in groups]}"
                    for name, groups in self._arrived.items()
                ]
                raise MachineError(f"all threads wait: {stuck}")

    def _stretch(self, group: Group, limit: int) -> int:
        """Run a group until it branches, waits, returns or meets others; how many steps that were."""
        pc, begun = group.pc, group.pc
        block, steps, active, races = self._block, self._steps, group.active, self._block.shared.races
        while pc < limit:
            step = steps[pc]
            if step is None:
                self._move(self._instructions[pc], pc, active)
                return pc - begun + 1
            if races is not None:
                for warp in warps_of(active):
                    races.where[warp] = self._instructions[pc].where
            try:
                step(block, active)
            except (MemoryAccessError, RaceError, AssertionError) as fault:
                raise MachineError(f"{self._instructions[pc]}: {fault}") from fault
            pc += 1
        self._put(pc, active)
        return pc - begun

    def _move(self, instruction: Instruction, pc: int, active: Mask) -> None:
        name, taken = instruction.parts[0], active
        if instruction.guard is not None:
            held = self._block.registers[instruction.guard.name]
            taken = active & (~held if instruction.negated else held)
        if name == "mbarrier":
            self._watching.append(Group(pc, active))
        elif name == "bra":
            self._put(instruction.targets[0], taken)
            self._put(pc + 1, active & ~taken)
        elif name == "brx":
            which = self._block.read(instruction.operands[0], "u32")
            for i, target in enumerate(instruction.targets):
                self._put(target, active & (which == i))
        elif name in ("ret", "exit"):
            self._left -= int(taken.sum())
            self._put(pc + 1, active & ~taken)
        else:
            self._arrive(instruction, pc, active)

    def _arrive(self, instruction: Instruction, pc: int, active: Mask) -> None:
        """At a barrier of a number of threads, or of all that are left."""
        name, *more = (operand.value for operand in instruction.operands if isinstance(operand, Number))
        here = self._arrived.setdefault(name, [])
        here.append(Group(pc + 1, active))
        if sum(int(group.active.sum()) for group in here) == (more[0] if more else self._left):
            groups = self._arrived.pop(name)
            if self._block.shared.races is not None:
                self._block.shared.races.meet(warps_of(np.logical_or.reduce([group.active for group in groups])))
            for group in groups:
                self._put(group.pc, group.active)

    def _put(self, pc: int, active: Mask) -> None:
        if active.any() and pc < len(self._instructions):
            self._ready.append(Group(pc, active))
