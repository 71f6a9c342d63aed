"""Which keys a query sees, in the vendor's words: sparse mode, pre_tokens, next_tokens, and the one compressed mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

#: The vendor's "no bound" of pre_tokens and next_tokens.
UNBOUNDED: Final = 2147483647
_MASK_SIZE: Final = 2048


@dataclass(frozen=True, slots=True)
class Sight:
    """A sparse mode of the fused operator, aligned so that the last query stands at the last key.

    Mode 3 is causal. Mode 4 is a band: a query at p sees keys p - pre_tokens .. p + next_tokens, so that a window of W
    keys is pre_tokens = W - 1. Mode 0 without a mask is everything; it is used for a single query only, where the
    operator ignores the mode. Modes 0 and 1 with a mask are never used: chips were seen to ignore it.
    """

    mode: int
    pre_tokens: int = UNBOUNDED
    next_tokens: int = UNBOUNDED

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """The operator's keyword arguments."""
        return {
            "sparse_mode": self.mode,
            "pre_tokens": self.pre_tokens,
            "next_tokens": self.next_tokens,
            "atten_mask": compressed_mask(device) if self.mode else None,
        }


ALL_KEYS: Final = Sight(0)
CAUSAL: Final = Sight(3)


def sight_of(causal: bool, window: int | None, lengths: Iterable[tuple[int, int]]) -> Sight:
    """The sight of requests with these (queries, keys).

    Mode 3 is documented for no more queries than keys; otherwise the same triangle is asked for as a band.
    """
    if window is not None:
        return Sight(4, window - 1, 0)
    if not causal:
        return Sight(4)
    return CAUSAL if all(queries <= keys for queries, keys in lengths) else Sight(4, UNBOUNDED, 0)


@cache
def compressed_mask(device: torch.device) -> Tensor:
    """[2048, 2048] bool, 1 above the diagonal: what modes 2 to 4 want whatever the lengths; one a device."""
    with torch.inference_mode(False):  # it outlives the mode that its first user is in
        return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)
