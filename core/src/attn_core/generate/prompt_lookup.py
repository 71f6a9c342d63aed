"""Guessing what comes next without a draft model: what followed the last few tokens where they stood before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: the longest run of last tokens that is looked for; shorter ones after it
LONGEST_NGRAM: Final = 3


def guess(tokens: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` tokens: those after the latest earlier place where the last tokens stand, the longest run first.

    Empty if not even the last token stands anywhere before. (Saxena 2023, prompt lookup decoding.)
    """
    for length in range(min(LONGEST_NGRAM, len(tokens) - 1), 0, -1):
        ending = list(tokens[-length:])
        for start in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[start : start + length]) == ending:
                return list(tokens[start + length : start + length + count])
    return []
