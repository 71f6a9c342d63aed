"""The work list of a step: which query rows of which KV head meet which keys, one item a workgroup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attn_wave.variant import WORK_FIELDS, Variant

#: Workgroups that keep a chip busy: two for each of an MI300X's 304 compute units.
_ENOUGH_WORKGROUPS: Final = 608
#: Keys below which a run is not split further: joining would cost more than it gives.
MIN_RUN: Final = 128
_MOST_RUNS: Final = 64


@dataclass(frozen=True, slots=True)
class Reach:
    """What one request's new tokens may see: host integers.

    ``row`` is the first of ``queries`` tokens, which stands at ``position``; keys are at positions ``begin`` to
    ``end``, the first of them at ``key`` in the key tables. ``causal``: a token sees no later position; ``window`` as
    in a layer.
    """

    row: int
    queries: int
    position: int
    key: int
    begin: int
    end: int
    causal: bool
    window: int | None

    def keys_of(self, first: int, last: int) -> tuple[int, int]:
        """Positions that the tokens ``first`` to ``last`` of the request see between them."""
        start = self.begin if self.window is None else max(self.begin, self.position + first - self.window + 1)
        return start, min(self.end, self.position + last + 1) if self.causal else self.end


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of a layer, and how far apart two KV heads lie, in units, for q (a whole group), k and v."""

    kv_heads: int
    group: int
    query_step: int
    key_step: int
    value_step: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """``items`` [W, 10] int32 on the host; results of run ``c`` lie ``c * stride`` rows further on."""

    items: Tensor
    runs: int
    stride: int


def work_of(
    reaches: Sequence[Reach], heads: Heads, variant: Variant, num_tokens: int, first_run: int = 0, num_drafts: int = 0
) -> Work:
    """Every item; a range of keys is split into runs where requests and heads alone leave a chip idle.

    Result rows are [runs, Hkv, T * G]. How keys are split follows from the lengths of the batch alone.
    """
    stride = heads.kv_heads * num_tokens * heads.group
    tiles = [tile for reach in reaches for tile in _tiles(reach, heads.group, variant.rows)]
    run = _run_length([stop - start for _, _, _, start, stop in tiles], heads.kv_heads, variant.keys)
    items, runs = [], 0
    for reach, row, count, start, stop in tiles:
        for c, begin in enumerate(range(start, stop, run)):
            runs = max(runs, c + 1)
            for head in range(heads.kv_heads):
                item = {
                    "row_start": row,
                    "row_count": count,
                    "query_offset": head * heads.query_step,
                    "key_start": reach.key + begin - reach.begin,
                    "key_count": min(run, stop - begin),
                    "key_offset": head * heads.key_step,
                    "key_base": begin,
                    "out_start": (first_run + c) * stride + head * num_tokens * heads.group + row,
                    "num_drafts": num_drafts,
                    "value_offset": head * heads.value_step,
                }
                items.append([item[name] for name in WORK_FIELDS])
    return Work(torch.tensor(items, dtype=torch.int32).reshape(-1, len(WORK_FIELDS)), runs, stride)


def _tiles(reach: Reach, group: int, rows: int) -> Iterator[tuple[Reach, int, int, int, int]]:
    """(reach, first row, rows, first key position, last + 1) of every tile that sees a key."""
    total = reach.queries * group
    for at in range(0, total, rows):
        count = min(rows, total - at)
        start, stop = reach.keys_of(at // group, (at + count - 1) // group)
        if start < stop:
            yield reach, reach.row * group + at, count, start, stop


def _run_length(lengths: Sequence[int], kv_heads: int, keys: int) -> int:
    longest = max(lengths, default=1)
    wanted = min(_MOST_RUNS, -(-_ENOUGH_WORKGROUPS // max(1, len(lengths) * kv_heads)))
    each = -(-longest // wanted)
    return max(MIN_RUN, -(-each // keys) * keys)
