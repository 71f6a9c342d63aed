"""Where a case's tokens lie: page ids for every sequence, in each of the memory layouts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from attn_core.testing.cases import Memory


@dataclass(frozen=True, slots=True)
class Placement:
    """Page ids in order for every sequence, the size of the pool, and a page that nobody is given."""

    pages: tuple[tuple[int, ...], ...]
    num_pages: int
    spare: int


def place(counts: Sequence[int], memory: Memory, shareable: Sequence[bool], seed: int) -> Placement:
    """``counts[s]`` pages for sequence s out of a pool that has more; page 0 is the null page.

    ``shareable[s]``: the first page of sequence s is full of cached tokens, so with ``memory="shared"`` all such
    sequences get the same one.
    """
    used = sum(counts)
    num_pages = 1 + used + max(3, used // 4)
    ids = _order(counts, memory, num_pages, random.Random(seed))
    pages: list[list[int]] = [[] for _ in counts]
    for sequence, page in ids:
        pages[sequence].append(page)
    if memory == "shared":
        first = next((row[0] for row, may in zip(pages, shareable, strict=True) if may), None)
        pages = [[first, *row[1:]] if may and first else row for row, may in zip(pages, shareable, strict=True)]
    taken = {page for row in pages for page in row}
    spare = next(page for page in range(num_pages - 1, 0, -1) if page not in taken)
    return Placement(tuple(map(tuple, pages)), num_pages, spare)


def _order(counts: Sequence[int], memory: Memory, num_pages: int, rng: random.Random) -> list[tuple[int, int]]:
    """(sequence, page id) for all pages, each sequence's in the order of its tokens."""
    by_sequence = [s for s, count in enumerate(counts) for _ in range(count)]
    used = len(by_sequence)
    if memory == "contiguous":
        return list(zip(by_sequence, range(1, used + 1), strict=True))
    if memory == "descending":
        return list(zip(by_sequence, range(used + 2, 2, -1), strict=True))
    if memory == "interleaved":
        turns = [s for j in range(max(counts, default=0)) for s, count in enumerate(counts) if j < count]
        return list(zip(turns, range(1, used + 1), strict=True))
    return list(zip(by_sequence, rng.sample(range(1, num_pages), used), strict=True))
