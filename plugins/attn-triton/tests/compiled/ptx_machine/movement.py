"""Instructions that move data: between registers, lanes, and memories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ptx_machine import tensor_cores
from ptx_machine.arithmetic import TYPES
from ptx_machine.memory import MemoryAccessError
from ptx_machine.program import Address, Many, Number, Operand, Register

if TYPE_CHECKING:
    from ptx_machine.block import Block, Mask
    from ptx_machine.walking import Step

Values = NDArray[Any]
_REDUCED: Final[dict[str, Any]] = {"max": np.max, "min": np.min, "add": np.sum}


def step_of(name: str, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step | None:
    """What an instruction of this kind does; None for one of another kind."""
    if name == "cp":
        return _asynchronous(parts, operands)
    if name == "cvta":
        return _move(("mov", "b64"), operands)
    if name == "ld" and parts[1] == "param":
        return _parameter(parts, operands)
    maker = {
        "mov": _move, "ld": _load, "st": _store, "shfl": _shuffle, "redux": _reduce, "ldmatrix": _load_matrices,
        "stmatrix": _store_matrices, "mma": _warp_product, "atom": _atomic,
    }.get(name)  # fmt: skip
    return None if maker is None else maker(parts, operands)


def registers_of(operand: Operand) -> tuple[Operand | None, ...]:
    return operand.parts if isinstance(operand, Many) else (operand,)


def _move(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    kind = parts[-1]
    target, source = operands
    if isinstance(source, Many):  # a register of several
        joined = source.parts
        narrow = f"b{int(kind[1:]) // len(joined)}"

        def join(block: Block, active: Mask) -> None:
            value: Values = np.zeros(active.shape, TYPES[kind])
            for i, part in enumerate(joined):
                assert part is not None
                value |= block.read(part, narrow).astype(TYPES[kind]) << TYPES[kind](i * int(narrow[1:]))
            block.write(target, value, active)

        return join
    if isinstance(target, Many):  # several of a register
        places, width = target.parts, int(kind[1:]) // len(target.parts)

        def part(block: Block, active: Mask) -> None:
            value = block.read(source, kind).copy()
            for i, place in enumerate(places):
                block.write(place, (value >> TYPES[kind](i * width)).astype(TYPES[f"b{width}"]), active)

        return part
    return lambda block, active: block.write(target, block.read(source, kind), active)


def _parameter(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    target, at = operands
    assert isinstance(at, Address)
    assert isinstance(at.base, Register)
    index = int(at.base.name.rpartition("_")[2])
    kind = parts[-1]

    def run(block: Block, active: Mask) -> None:
        block.write(target, block.read(Number(block.params[index]), kind), active)

    return run


def _place(parts: tuple[str, ...]) -> tuple[bool, int, int]:
    """Whether it is shared memory, how many values, and the bytes of each."""
    count = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
    width = np.dtype(TYPES[parts[-1]]).itemsize
    assert "shared" in parts or "global" in parts, "which memory"
    return "shared" in parts, count, width


def _aligned(addresses: Values, size: int) -> None:
    if (addresses % size).any():
        raise MemoryAccessError(f"{size} bytes at {int(addresses.max()):#x}: not aligned")


def _load(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    shared, count, width = _place(parts)
    targets, at = registers_of(operands[0]), operands[1]
    signed = parts[-1].startswith("s")

    def run(block: Block, active: Mask) -> None:
        addresses = block.addresses(at, active)
        _aligned(addresses, width * count)
        places = [addresses + i * width for i in range(count)]
        if shared:
            warps = np.flatnonzero(active) // 32
            found = [block.shared.load(place, width, warps) for place in places]
        else:
            found = [block.memory.load(place, width) for place in places]
        for target, values in zip(targets, found, strict=True):
            if target is not None:
                assert isinstance(target, Register)
                own = block.registers[target.name]
                own[active] = (
                    values.view(f"i{width}").astype(f"i{own.dtype.itemsize}").view(own.dtype) if signed else values
                )

    return run


def _store(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    shared, count, width = _place(parts)
    at, sources = operands[0], registers_of(operands[1])
    kind = parts[-1]

    def run(block: Block, active: Mask) -> None:
        addresses = block.addresses(at, active)
        _aligned(addresses, width * count)
        for i, source in enumerate(sources):
            assert source is not None
            values = np.broadcast_to(_bits(block, source, kind), active.shape)[active]
            if shared:
                block.shared.store(addresses + i * width, values, np.flatnonzero(active) // 32)
            else:
                block.memory.store(addresses + i * width, values)

    return run


def _atomic(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    """An addition to global memory, one thread after the other."""
    assert "global" in parts, parts
    assert parts[-2:] == ("add", "u32"), parts
    target, at, amount = operands
    assert isinstance(target, Register)

    def run(block: Block, active: Mask) -> None:
        amounts = np.broadcast_to(block.read(amount, "u32"), active.shape)[active]
        before = []
        for address, more in zip(block.addresses(at, active), amounts, strict=True):
            place = np.asarray([address])
            before.append(block.memory.load(place, 4)[0])
            block.memory.store(place, np.asarray([before[-1] + more], np.uint32))
        block.registers[target.name][active] = before

    return run


def _bits(block: Block, source: Operand, kind: str) -> Values:
    """A register's low bits as unsigned numbers of the width of ``kind``: bytes travel in wider registers."""
    width = np.dtype(TYPES[kind]).itemsize
    if isinstance(source, Register) and block.registers[source.name].dtype.itemsize != width:
        return block.registers[source.name].astype(f"u{width}")
    return block.read(source, f"b{8 * width}")


def _asynchronous(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    """cp.async: at once, or where the machine is late when its group is waited for."""
    from ptx_machine.block import Copy

    if parts[2] == "commit_group":
        return lambda block, active: block.copies.commit()
    if parts[2] in ("wait_group", "wait_all"):
        pending = operands[0].value if operands and isinstance(operands[0], Number) else 0

        def wait(block: Block, active: Mask) -> None:
            for copy in block.copies.wait(pending):
                _put(block, copy)

        return wait
    assert parts[1] == "async"
    to, source, size = operands[0], operands[1], operands[2]
    assert isinstance(size, Number)
    taken = operands[3] if len(operands) > 3 else size

    def run(block: Block, active: Mask) -> None:
        at, found = block.addresses(to, active), block.addresses(source, active)
        _aligned(at, size.value)
        wanted = np.broadcast_to(block.read(taken, "u32"), active.shape)[active]
        data = np.zeros((len(at), size.value), np.uint8)
        some = wanted > 0
        assert ((wanted == 0) | (wanted == size.value)).all(), "a part of a copy"
        _aligned(found[some], size.value)
        for i in range(0, size.value, 4):
            data[some, i : i + 4] = block.memory.load(found[some] + i, 4).view(np.uint8).reshape(-1, 4)
        copy = Copy(at, data, np.flatnonzero(active) // 32)
        if block.late:
            block.shared.check(at, size.value)
            block.copies.open.append(copy)
        else:
            _put(block, copy)

    return run


def _put(block: Block, copy: Any) -> None:
    for i in range(0, copy.data.shape[1], 4):
        block.shared.store(
            copy.at + i, np.ascontiguousarray(copy.data[:, i : i + 4]).view(np.uint32)[:, 0], copy.warps, copied=True
        )


def _shuffle(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    mode = parts[2]
    target, source, lane, _ = operands[:4]
    assert mode in ("bfly", "idx", "up", "down"), mode

    def run(block: Block, active: Mask) -> None:
        own = np.arange(len(active))
        by = np.broadcast_to(block.read(lane, "u32"), active.shape).astype(np.int64)
        here = own % 32
        wanted = {"bfly": here ^ by, "idx": by % 32, "up": here - by, "down": here + by}[mode]
        wanted = np.where((wanted < 0) | (wanted > 31), here, wanted)
        block.write(target, np.broadcast_to(block.read(source, "b32"), active.shape)[own - here + wanted], active)

    return run


def _reduce(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    over, kind = _REDUCED[parts[2]], parts[-1]

    def run(block: Block, active: Mask) -> None:
        warps = np.broadcast_to(block.read(operands[1], kind), active.shape).reshape(-1, 32)
        block.write(operands[0], np.repeat(over(warps, axis=1), 32).astype(TYPES[kind]), active)

    return run


def _matrices(parts: tuple[str, ...]) -> bool:
    assert "m8n8" in parts
    assert parts[-1] == "b16"
    return "trans" in parts


def _load_matrices(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    transposed = _matrices(parts)
    targets = registers_of(operands[0])

    def run(block: Block, active: Mask) -> None:
        rows = np.zeros(len(active), np.int64)
        rows[active] = block.addresses(operands[1], active)
        for first in range(0, len(active), 32):
            if not active[first]:
                continue
            own = slice(first, first + 32)
            _aligned(rows[own][: 8 * len(targets)], 16)
            found = tensor_cores.load_matrices(block.shared, rows[own], len(targets), transposed, first // 32)
            for i, target in enumerate(targets):
                assert isinstance(target, Register)
                block.registers[target.name][own] = found[:, i]

    return run


def _store_matrices(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    transposed = _matrices(parts)
    sources = registers_of(operands[1])

    def run(block: Block, active: Mask) -> None:
        rows = np.zeros(len(active), np.int64)
        rows[active] = block.addresses(operands[0], active)
        values = np.stack([block.read(s, "b32") for s in sources if s is not None], 1)
        for first in range(0, len(active), 32):
            if active[first]:
                own = slice(first, first + 32)
                _aligned(rows[own][: 8 * len(sources)], 16)
                tensor_cores.store_matrices(block.shared, rows[own], values[own], transposed, first // 32)

    return run


def _warp_product(parts: tuple[str, ...], operands: tuple[Operand, ...]) -> Step:
    assert parts[:6] == ("mma", "sync", "aligned", "m16n8k16", "row", "col"), parts
    assert parts[6] == "f32", "16-bit accumulators"
    kind = parts[7]

    def run(block: Block, active: Mask) -> None:
        a, b = (np.stack([block.read(r, "b32") for r in registers_of(o) if r is not None], 1) for o in operands[1:3])
        c = np.stack([block.read(r, "f32") for r in registers_of(operands[3]) if r is not None], 1)
        for first in range(0, len(active), 32):
            if active[first]:
                own = slice(first, first + 32)
                d = tensor_cores.warp_product(a[own], b[own], c[own], kind)
                for i, target in enumerate(registers_of(operands[0])):
                    assert isinstance(target, Register)
                    block.registers[target.name].view(np.float32)[own] = d[:, i]

    return run
