"""Calls over given keys: their lengths from the device, and which rows see no key at all."""

from __future__ import annotations

from itertools import accumulate, pairwise

from torch import Tensor

from attn_ascend.step import Lengths, check_size


def lengths_of(query_start_loc: Tensor, key_start_loc: Tensor) -> Lengths:
    """Queries and keys of each request. Reads the device: the call has no batch whose lengths are on the host."""
    lengths = Lengths(
        [end - start for start, end in pairwise(query_start_loc.tolist())],
        [end - start for start, end in pairwise(key_start_loc.tolist())],
    )
    check_size(lengths.queries, lengths.keys)
    return lengths


def blind_rows(lengths: Lengths, causal: bool) -> list[slice]:
    """The rows that see no key: of requests without keys and, causally, the first ones where there are fewer keys."""
    starts = accumulate(lengths.queries, initial=0)
    blind = []
    for (queries, keys), start in zip(lengths.pairs, starts, strict=False):
        unseen = queries if keys == 0 else max(0, queries - keys) if causal else 0
        if unseen:
            blind.append(slice(start, start + unseen))
    return blind
