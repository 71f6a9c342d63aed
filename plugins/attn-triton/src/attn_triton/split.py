"""Into how many pieces the keys of a step are cut: decided on the host from what it knows, else left to the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attn_triton.geometry import Geometry
from attn_triton.parameters import FORCED, LONG_KEYS, DecodeTile, Load

#: What a turn of programs costs beside its keys, as a share of one whole request's time: starting, and its part of the
#: merge.
TURN_COST = 0.01


@dataclass(frozen=True, slots=True)
class Cut:
    """``fixed``: every request in ``splits`` pieces, known on the host; else ``groups`` pieces that the schedule kernel
    makes, of which ``stream_groups`` equal ones where lengths are uneven, and ``splits`` for each request where they
    are even.
    """

    tile: DecodeTile
    tiles: int
    fixed: bool
    splits: int
    groups: int
    stream_groups: int

    @property
    def slots(self) -> int:
        """How many partial results there may be, a row tile and KV head."""
        if self.fixed:
            return self.groups if self.splits > 1 else 0
        return 2 * max(self.stream_groups, self.groups if self.splits > 1 else 0)


def cut_keys(
    tile_of: Callable[[Load], DecodeTile],
    multiprocessors: int,
    geometry: Geometry,
    *,
    batch: int,
    query_len: int,
    most_keys: int,
    lengths: list[int] | None,
    window: int | None,
) -> Cut:
    """How to cut ``batch`` requests of at most ``query_len`` queries and ``most_keys`` keys; ``lengths`` if the host
    has them.
    """
    rows = query_len * geometry.group
    if window is not None:
        most_keys = min(most_keys, window + query_len - 1)
        lengths = None if lengths is None else [min(n, window + query_len - 1) for n in lengths]
    probe = tile_of("few")
    heads = geometry.num_kv_heads * -(-rows // probe.block_m)
    even = batch == 1 or (lengths is not None and max(lengths, default=0) * batch * 4 <= sum(lengths) * 5)
    if "cut" in FORCED:
        even = FORCED["cut"] == "fixed"
    load: Load
    if batch * heads <= multiprocessors:
        load = "long" if batch * heads * most_keys >= LONG_KEYS * multiprocessors else "few"
    else:
        load = "many" if even or lengths is None else "mixed"
    tile = tile_of(load)
    slots = multiprocessors * tile.per_sm
    splits = best_splits(batch * heads, slots, -(-most_keys // tile.block_n) // tile.least_blocks)
    tiles = -(-rows // tile.block_m)
    if even:
        return Cut(tile, tiles, True, splits, batch * splits, 0)
    stream = max(1, slots // heads)
    splits = max(1, min(splits, slots // (batch * heads)))
    groups = stream if lengths is not None else max(stream, batch * splits)
    return Cut(tile, tiles, False, 0 if lengths is not None else splits, groups, stream)


def best_splits(programs: int, slots: int, blocks: int) -> int:
    """Pieces a request such that ``programs`` times them fill ``slots`` resident programs in the least time.

    With s pieces the work takes ceil(programs * s / slots) turns of 1/s of a request each. At most two partial results
    for each resident program, so that the workspace is bounded by the chip.
    """
    best, least = 1, float("inf")
    for s in range(1, max(1, min(blocks, 2 * slots // programs)) + 1):
        time = -(-programs * s // slots) * (1 / s + TURN_COST)
        if time < least - 1e-9:
            best, least = s, time
    return best
