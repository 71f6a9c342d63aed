"""The work list of a step: which query rows of which KV head meet which keys, one item a workgroup."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """What the new tokens of each request may see: [B] int64 each, all on the host or (captured) all on the device.

    ``row`` is the first of ``queries`` tokens, which stands at ``position``; keys are at positions ``begin`` to
    ``end``; position 0 is at ``key`` in the key tables. ``causal``: a token sees no later position; ``window`` as in a
    layer. In a captured step ``each`` is how many tokens every request has, ``most`` how many keys it can have: shapes
    follow from these, and nothing is read.
    """

    row: Tensor
    queries: Tensor
    position: Tensor
    key: Tensor
    begin: Tensor
    end: Tensor
    causal: bool
    window: int | None
    each: int | None = None
    most: int = 0


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
    """``items`` [W, 10] int32; the results of run ``c`` lie ``c * Hkv * T * G`` rows further on."""

    items: Tensor
    runs: int


@dataclass(frozen=True, slots=True, eq=False)
class _Tiles:
    """Query rows that one workgroup takes at a time, [n] int64 each: of a request, and the keys that they see."""

    row: Tensor
    count: Tensor
    table: Tensor
    start: Tensor
    stop: Tensor


def work_of(
    reach: Reach, heads: Heads, variant: Variant, num_tokens: int, *, first_run: int = 0, num_drafts: int = 0
) -> Work:
    """Every item; a range of keys is split into runs where requests and heads alone leave a chip idle.

    Result rows are [runs, Hkv, T * G]. How keys are split follows from the lengths of the batch alone. A captured step
    has as many items as the most keys need, some without keys.
    """
    tiles = _tiles(reach, heads.group, variant.rows)
    lengths = tiles.stop - tiles.start
    if reach.each is None:
        longest = int(lengths.max()) if len(lengths) else 0
        wanted = _wanted_runs(int((lengths > 0).sum()), heads.kv_heads)
        run: Tensor | int = max(MIN_RUN, -(-longest // (wanted * variant.keys)) * variant.keys)
        runs = -(-longest // int(run))
    else:
        wanted = _wanted_runs(len(lengths), heads.kv_heads)
        runs = max(1, min(wanted, -(-reach.most // MIN_RUN)))
        step = runs * variant.keys
        run = ((lengths.amax() + step - 1).div(step, rounding_mode="floor") * variant.keys).clamp(min=MIN_RUN)
    items = _items(tiles, heads, run, runs, num_tokens * heads.group, first_run, num_drafts)
    if reach.each is None:
        items = items[items[:, WORK_FIELDS.index("key_count")] > 0]
    return Work(items, runs)


def _wanted_runs(tiles: int, kv_heads: int) -> int:
    return min(_MOST_RUNS, -(-_ENOUGH_WORKGROUPS // max(1, tiles * kv_heads)))


def _tiles(reach: Reach, group: int, rows: int) -> _Tiles:
    request, at = _cut(reach, group, rows)
    queries, position = reach.queries[request], reach.position[request]
    count = (queries * group - at).clamp(max=rows)
    start, stop = reach.begin[request], reach.end[request]
    if reach.window is not None:
        first = position + at.div(group, rounding_mode="floor")
        start = torch.maximum(start, first - reach.window + 1)
    if reach.causal:
        last = position + (at + count - 1).div(group, rounding_mode="floor")
        stop = torch.minimum(stop, last + 1)
    return _Tiles(reach.row[request] * group + at, count, reach.key[request], start, torch.maximum(start, stop))


def _cut(reach: Reach, group: int, rows: int) -> tuple[Tensor, Tensor]:
    """Of each tile its request, and the first of its rows among those of the request."""
    device, requests = reach.queries.device, len(reach.queries)
    if reach.each is not None:
        tiles = -(-reach.each * group // rows)
        number = torch.arange(requests * tiles, device=device)
        return number.div(max(1, tiles), rounding_mode="floor"), number % max(1, tiles) * rows
    each = (reach.queries * group + rows - 1).div(rows, rounding_mode="floor")
    request = torch.repeat_interleave(torch.arange(requests), each)
    return request, (torch.arange(len(request)) - (each.cumsum(0) - each)[request]) * rows


def _items(
    tiles: _Tiles, heads: Heads, run: Tensor | int, runs: int, rows: int, first_run: int, num_drafts: int
) -> Tensor:
    """[tiles * runs * Hkv, 10] int32, those without keys among them."""
    device = tiles.row.device
    tile = [t[:, None, None] for t in (tiles.row, tiles.count, tiles.table, tiles.start, tiles.stop)]
    row, count, table, start, stop = tile
    number = torch.arange(runs, device=device)[None, :, None]
    head = torch.arange(heads.kv_heads, device=device)[None, None, :]
    begin = torch.minimum(start + number * run, stop)
    columns = {
        "row_start": row,
        "row_count": count,
        "query_offset": head * heads.query_step,
        "key_start": table + begin,
        "key_count": (stop - begin).clamp(max=run) if isinstance(run, int) else torch.minimum(stop - begin, run),
        "key_offset": head * heads.key_step,
        "key_base": begin,
        "out_start": ((first_run + number) * heads.kv_heads + head) * rows + row,
        "num_drafts": torch.full_like(head, num_drafts),
        "value_offset": head * heads.value_step,
    }
    shape = (len(tiles.row), runs, heads.kv_heads)
    items = torch.stack([columns[name].expand(shape) for name in WORK_FIELDS], -1)
    return items.flatten(0, 2).to(torch.int32)
