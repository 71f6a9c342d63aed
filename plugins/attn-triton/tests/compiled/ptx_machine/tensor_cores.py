"""Matrix instructions: which thread holds what, and how a descriptor names a tile of shared memory."""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptx_machine.arithmetic import from_bf16
from ptx_machine.memory import SharedMemory

Values = NDArray[Any]
#: Bytes of a row of the swizzled layouts, by the top bits of a descriptor: none, 128, 64, 32.
_ROW_BYTES: Final = {0: 16, 1: 128, 2: 64, 3: 32}


def numbers(bits: Values, kind: str) -> NDArray[np.float32]:
    """16-bit numbers as float32."""
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def halves(words: Values) -> Values:
    """[..., n] of packed pairs as [..., 2 n], the low half first."""
    return np.ascontiguousarray(words).view(np.uint16)


@functools.cache
def accumulator(width: int) -> tuple[Values, Values]:
    """Row and column of each register of each of 128 threads in a [64, width] tile of a warpgroup: [128, width / 2]."""
    thread, i = np.arange(128)[:, None], np.arange(width // 2)[None, :]
    lane = thread % 32
    return 16 * (thread // 32) + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


@functools.cache
def left_fragment() -> tuple[Values, Values]:
    """Row and column of each half of a warp's four registers in its [16, 16] tile: [32, 8]."""
    lane, i = np.arange(32)[:, None], np.arange(8)[None, :]
    return lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)


@functools.cache
def right_fragment() -> tuple[Values, Values]:
    """Row (k) and column (n) of each half of a warp's two registers in its [16, 8] tile: [32, 4]."""
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    return 2 * (lane % 4) + i % 2 + 8 * (i // 2), np.broadcast_to(lane // 4, (32, 4))


@functools.cache
def _element_offsets(rows: int, mode: int, lead: int, stride: int, across: bool) -> Values:
    """Byte offsets, before the swizzle, of a [rows, 16] operand tile; ``across``: rows lie side by side (MN-major)."""
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    width = _ROW_BYTES[mode]
    if across:
        held = width // 2
        first, second = (lead, stride) if mode else (stride, lead)
        return row // held * first + row % held * 2 + k % 8 * width + k // 8 * second
    if mode:
        return row // 8 * stride + row % 8 * width + k * 2
    return row // 8 * stride + k // 8 * lead + row % 8 * 16 + k % 8 * 2


def described_tile(shared: SharedMemory, descriptor: int, rows: int, across: bool, first_warp: int) -> Values:
    """The bits [rows, 16] of an operand that a wgmma descriptor names, as four warps read it. Raises
    MemoryAccessError.
    """
    start, lead, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62 & 3
    assert not descriptor >> 49 & 7, "a base offset"
    at = start + _element_offsets(rows, mode, lead, stride, across)
    if mode:
        at = at ^ ((at >> 7 & (_ROW_BYTES[mode] // 16 - 1)) << 4)
    places = at.astype(np.int64)
    if shared.races is not None:
        shared.races.read_fenced(places.ravel(), 2, first_warp)
    return shared.load(places, 2, *(np.asarray(first_warp + i) for i in range(4)))


def warpgroup_product(
    shared: SharedMemory, a: Values | int, b: int, width: int, kind: str, across: tuple[bool, bool], first_warp: int
) -> NDArray[np.float32]:
    """[64, width]: a (a descriptor, or registers [128, 4]) times what descriptor ``b`` names."""
    if isinstance(a, int):
        left = described_tile(shared, a, 64, across[0], first_warp)
    else:
        left = np.empty((64, 16), np.uint16)
        row, column = left_fragment()
        for warp in range(4):
            left[16 * warp + row, column] = halves(a[32 * warp : 32 * warp + 32])
    right = described_tile(shared, b, width, across[1], first_warp)
    product: NDArray[np.float32] = numbers(left, kind) @ numbers(right, kind).T
    return product


def warp_product(a: Values, b: Values, c: Values, kind: str) -> NDArray[np.float32]:
    """mma.m16n8k16 of one warp: registers a [32, 4], b [32, 2], c [32, 4] to d [32, 4]."""
    left, right = np.empty((16, 16), np.uint16), np.empty((16, 8), np.uint16)
    row, column = left_fragment()
    left[row, column] = halves(a)
    row, column = right_fragment()
    right[row, column] = halves(b)
    product: NDArray[np.float32] = numbers(left, kind) @ numbers(right, kind)
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    return np.asarray(product[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] + c)


def load_matrices(shared: SharedMemory, rows: Values, count: int, transposed: bool, warp: int) -> Values:
    """ldmatrix of one warp: row addresses of lanes [32] to registers [32, count]."""
    found = np.empty((32, count), np.uint32)
    lane = np.arange(32)
    for i in range(count):
        at = rows[8 * i : 8 * i + 8, None] + 2 * np.arange(8)[None, :]
        matrix = shared.load(at.astype(np.int64), 2, np.asarray(warp))
        matrix = matrix.T if transposed else matrix
        low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
        found[:, i] = low.astype(np.uint32) | (high.astype(np.uint32) << 16)
    return found


def store_matrices(shared: SharedMemory, rows: Values, registers: Values, transposed: bool, warp: int) -> None:
    """stmatrix of one warp, the reverse."""
    lane = np.arange(32)
    for i in range(registers.shape[1]):
        matrix = np.empty((8, 8), np.uint16)
        matrix[lane // 4, 2 * (lane % 4)] = registers[:, i] & 0xFFFF
        matrix[lane // 4, 2 * (lane % 4) + 1] = registers[:, i] >> 16
        at = rows[8 * i : 8 * i + 8, None] + 2 * np.arange(8)[None, :]
        shared.store(at.astype(np.int64), matrix.T if transposed else matrix, np.asarray(warp))
