"""Launches whose rows begin at strides. These go in units, so that the compiler knows that rows begin at 16 bytes: a
stride that is a number of elements says nothing of alignment, and rows are then read and written 2 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from attn_triton.launch import Bound

#: Elements of a unit: 16 bytes of 16-bit numbers.
UNIT: Final = 8


@dataclass(slots=True, eq=False)
class Strided:
    """One launch, compiled for the strides of queries and output: in units of 8 elements, or of 1 where one is odd.

    ``make`` gives the launch for a unit; its token and head strides of q and out are the arguments ``at``.
    """

    make: Callable[[int], Bound]
    at: slice
    _made: dict[int, Bound] = field(default_factory=dict)

    def of(self, q: Tensor, out: Tensor) -> Bound:
        """The launch for these two, its strides in place."""
        q_token, q_head = q.stride()[:2]
        out_token, out_head = out.stride()[:2]
        unit = 1 if (q_token | q_head | out_token | out_head) % UNIT else UNIT
        bound = self._made.get(unit)
        if bound is None:
            bound = self._made[unit] = self.make(unit)
        bound.values[self.at] = (q_token // unit, q_head // unit, out_token // unit, out_head // unit)
        return bound
