"""The machine: one block's threads in step, apart where branches part them, until all have returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptx_machine import barriers, movement, tensor_cores
from ptx_machine.arithmetic import operation
from ptx_machine.barriers import Barriers, Boxes
from ptx_machine.block import Block, Mask, Product, Queue
from ptx_machine.memory import SHARED_BASE, GlobalMemory, SharedMemory
from ptx_machine.program import Instruction, Many, Number, Operand, Program, Register
from ptx_machine.races import Races
from ptx_machine.walking import MachineError, Step, Walk, moves

Values = NDArray[Any]

_DTYPES: Final = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
#: What changes nothing that is seen here: order of memory, and when a kernel may begin.
_NOTHING: Final = ("fence", "griddepcontrol", "membar", "setmaxnreg", "bar", "barrier")


class Machine:
    """Runs blocks of one kernel. ``late``: asynchronous work reads and writes as late as it may, else at once, and
    races
    of warps in shared memory are faults.
    """

    def __init__(self, program: Program, *, late: bool = False) -> None:
        self.program, self.late = program, late
        self._steps: list[Step | None] = []
        for instruction in program.instructions:
            try:
                self._steps.append(_step(instruction))
            except (KeyError, AssertionError) as error:
                raise MachineError(f"{instruction}: not known here ({error!r})") from error

    def run(
        self, grid: tuple[int, int], params: Sequence[int], memory: GlobalMemory, descriptors: Sequence[Boxes] = ()
    ) -> None:
        """All blocks, one after the other. ``params`` are bits, or places among ``descriptors``. Raises
        MachineError.
        """
        for y in range(grid[1]):
            for x in range(grid[0]):
                block = self._block(x, y, params, memory, descriptors)
                block.registers["%nctaid.x"][:] = grid[0]
                with np.errstate(all="ignore"):
                    Walk(self.program.instructions, self._steps, block).run()

    def _block(
        self, x: int, y: int, params: Sequence[int], memory: GlobalMemory, descriptors: Sequence[Boxes]
    ) -> Block:
        count = self.program.threads
        registers: dict[str, Values] = {
            name: np.zeros(count, _DTYPES[width]) for name, width in self.program.widths.items()
        }
        registers["%tid.x"][:] = np.arange(count)
        registers["%ctaid.x"][:], registers["%ctaid.y"][:] = x, y
        races = Races(count // 32, SHARED_BASE, self.program.shared) if self.late else None
        shared = SharedMemory(self.program.shared, races)
        return Block(registers, memory, shared, params, descriptors, self.late, Barriers(self.late))


def _step(instruction: Instruction) -> Step | None:
    """What an instruction does; None if it moves threads."""
    if moves(instruction):
        return None
    step = _unguarded(instruction)
    if instruction.guard is None:
        return step
    guard, negated = instruction.guard.name, instruction.negated

    def guarded(block: Block, active: Mask) -> None:
        held = block.registers[guard]
        some = active & (~held if negated else held)
        if some.any():
            step(block, some)

    return guarded


def _unguarded(instruction: Instruction) -> Step:
    parts, operands = instruction.parts, instruction.operands
    name = parts[0]
    if parts[:3] == ("fence", "proxy", "async"):
        return _fence
    if name in _NOTHING or parts[:2] == ("wgmma", "fence"):
        return lambda block, active: None
    if name == "mbarrier":
        return barriers.step_of(parts, operands)
    if name == "elect":
        return barriers.elect(operands)
    if parts[:3] == ("cp", "async", "bulk"):
        return barriers.box_copy(parts, operands)
    found = movement.step_of(name, parts, operands)
    if found is not None:
        return found
    if name == "wgmma":
        return _wgmma(parts, operands)
    compute, kinds, _ = operation(parts)
    target, sources = operands[0], operands[1:]
    assert len(kinds) == len(sources), f"{len(sources)} sources"
    pairs = tuple(zip(sources, kinds, strict=True))

    def run(block: Block, active: Mask) -> None:
        block.write(target, np.asarray(compute(*[block.read(s, k) for s, k in pairs])), active)

    return run


def _fence(block: Block, active: Mask) -> None:
    """What a warp has stored is for tensor cores and copy engine from here on."""
    if block.shared.races is not None:
        block.shared.races.fence(barriers.warps_of(active))


def _wgmma(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    if parts[1] == "commit_group":

        def commit(block: Block, active: Mask) -> None:
            for queue in _queues(block, active):
                queue.commit()

        return commit
    if parts[1] == "wait_group":
        left = operands[0]
        assert isinstance(left, Number)

        def wait(block: Block, active: Mask) -> None:
            for queue in _queues(block, active):
                for product in queue.wait(left.value):
                    product.finish()

        return wait
    shape, kind = parts[4], parts[-1]
    width = int(shape[shape.index("n") + 1 : shape.index("k")])
    assert shape == f"m64n{width}k16", shape
    assert parts[-3] == "f32", "16-bit accumulators"
    into, a, b, scale_d, *rest = operands
    signs = [n.value for n in rest if isinstance(n, Number)]
    assert signs[:2] == [1, 1], "negated operands"
    in_registers = isinstance(a, Many)
    across = (False, bool(signs[2])) if in_registers else (bool(signs[2]), bool(signs[3]))

    def issue(block: Block, active: Mask) -> None:
        for first in range(0, len(active), 128):
            own = slice(first, first + 128)
            if not active[own].any():
                continue
            assert active[own].all(), "a warpgroup in parts"
            mask = np.zeros_like(active)
            mask[own] = True
            keep = bool(np.broadcast_to(block.read(scale_d, "pred"), active.shape)[first])
            left: Values | int
            if isinstance(a, Many):
                left = np.stack([block.read(r, "b32")[own] for r in a.parts if r is not None], 1)
            else:
                left = int(np.broadcast_to(block.read(a, "b64"), active.shape)[first])
            right = int(np.broadcast_to(block.read(b, "b64"), active.shape)[first])

            def finish(mask: Mask = mask, left: Values | int = left, right: int = right, keep: bool = keep) -> None:
                _accumulate(block, into, mask, left, right, keep, width, kind, across)

            if block.late:
                block.products.setdefault(first, Queue()).open.append(Product(finish))
            else:
                finish()

    return issue


def _queues(block: Block, active: Mask) -> list[Queue]:
    return [block.products.setdefault(i, Queue()) for i in range(0, len(active), 128) if active[i]]


def _accumulate(
    block: Block, into: Operand, mask: Mask, left: Values | int, right: int, keep: bool, width: int, kind: str,
    across: tuple[bool, bool],
) -> None:  # fmt: skip
    first_warp = int(np.flatnonzero(mask)[0]) // 32
    product = tensor_cores.warpgroup_product(block.shared, left, right, width, kind, across, first_warp)
    rows, columns = tensor_cores.accumulator(width)
    assert isinstance(into, Many)
    assert len(into.parts) == rows.shape[1], f"{len(into.parts)} accumulators for n{width}"
    for i, register in enumerate(into.parts):
        assert isinstance(register, Register)
        own = block.registers[register.name].view(np.float32)
        part = product[rows[:, i], columns[:, i]]
        own[mask] = own[mask] + part if keep else part
