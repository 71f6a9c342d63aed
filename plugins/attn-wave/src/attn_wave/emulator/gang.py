"""Waves of several workgroups in step: one numpy operation for the vector instruction of all of them.

Waves of one workgroup are never in one gang: what passes between them without a barrier must still show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attn_wave.emulator.memory import all_lanes
from attn_wave.emulator.wave import U32, U64, Lanes, Wave, spread


class Gang(Wave):
    """Vector registers and scratch [rows, waves * 64]; those of each of its waves become views of them.

    Scalar instructions, and vector instructions of a single lane, are done to each of ``waves``; `follow` is due after
    those that may have changed which lanes are active.
    """

    __slots__ = ("_across", "_waves")

    def __init__(self, waves: Sequence[Wave]) -> None:
        one = waves[0]
        self._waves = tuple(waves)
        self._across: dict[int, tuple[Lanes, Lanes]] = {}
        self.lanes = 64 * len(waves)
        self.first_lanes = np.repeat(np.arange(0, self.lanes, 64), 64)
        self.memory, self.lds, self.lds_size = one.memory, one.lds, one.lds_size
        self.lds_first = np.repeat(np.array([wave.lds_first for wave in waves]), 64)
        self.vector = _joined(waves, "vector")
        self.accumulators = _joined(waves, "accumulators")
        self.scratch = _joined(waves, "scratch")
        self.follow()

    def follow(self) -> None:
        """Takes over which lanes are active."""
        self.full = all(wave.full for wave in self._waves)
        self.active = all_lanes(self.lanes) if self.full else np.concatenate([wave.active for wave in self._waves])

    @property
    def waves(self) -> Sequence[Wave]:
        return self._waves

    def scalar_lanes(self, index: int) -> Any:
        values = [wave.scalar[index] for wave in self._waves]
        if values.count(values[0]) == len(values):
            return U32(values[0])
        return np.repeat(np.array(values, U32), 64)

    def scalar_lanes64(self, read: Callable[[Wave], int]) -> Any:
        values = [read(wave) for wave in self._waves]
        if values.count(values[0]) == len(values):
            return U64(values[0])
        return np.repeat(np.array(values, U64), 64)

    def masks(self, read: Callable[[Wave], int]) -> Lanes:
        masks = np.array([read(wave) for wave in self._waves], "<u8")
        return np.unpackbits(masks.view(np.uint8), bitorder="little").view(np.bool_)

    def set_masks(self, write: Callable[[Wave, int], None], lanes: Lanes) -> None:
        masks = np.packbits(lanes, bitorder="little").view("<u8").tolist()
        for wave, mask in zip(self._waves, masks, strict=True):
            write(wave, mask)

    def spread(self, value: Any) -> Lanes:
        value = spread(value)
        return value if value.size == self.lanes else np.repeat(value, self.lanes)

    def across(self, where: Lanes) -> Lanes:
        found = self._across.get(id(where))
        if found is None:
            # the array is kept, so that its id stays its own
            found = where, np.tile(where, len(self._waves)) + self.first_lanes
            self._across[id(where)] = found
        return found[1]

    def each(self, lanes: Lanes) -> Lanes:
        return np.tile(lanes, len(self._waves))


def _joined(waves: Sequence[Wave], name: str) -> Lanes:
    """The registers or scratch of all, [rows, waves * 64]; each wave keeps a view."""
    own = [getattr(wave, name) for wave in waves]
    whole = np.stack(own, 1)
    for i, wave in enumerate(waves):
        setattr(wave, name, whole[:, i])
    return whole.reshape(len(whole), 64 * len(waves))
