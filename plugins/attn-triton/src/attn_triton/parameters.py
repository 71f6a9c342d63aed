"""Launch parameters of the attention kernels: a committed table by architecture and shape class, and a default for the
rest.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final, Literal, cast

from attn_core.planning.claims import ArchSpec

from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, power_of_two_from

#: How full a step makes the chip: "few" pairs of a request and a KV head, fewer than multiprocessors; "long": as few,
#: but each multiprocessor has LONG_KEYS keys or more to read; "many"; "mixed": many, of lengths that differ.
Load = Literal["few", "long", "many", "mixed"]
LOADS: Final[tuple[Load, ...]] = ("few", "long", "many", "mixed")
LONG_KEYS: Final = 8192


#: What a tuning run tries in place of the table: "decode" and "extend" entries, "cut" ("fixed" or "stream"), "gluon"
#: (False: plain kernels), "near". Empty in serving.
FORCED: Final[dict[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """``block_m`` rows and ``block_n`` keys a block; ``per_sm`` programs are resident on a multiprocessor; a request is
    not cut into pieces of fewer than ``least_blocks``. ``gluon``: of the kernel of `hopper_decode`.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_sm: int
    least_blocks: int = 1
    gluon: bool = False


@dataclass(frozen=True, slots=True)
class ExtendTile:
    """``block_m`` rows, ``block_n`` keys a tile; ``by_head``: row blocks of one KV head side by side, else longest
    first.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    by_head: bool


def decode_tile(
    chip: Chip, geometry: Geometry, rows: int, load: Load, *, tree: bool = False, gluon: bool = False
) -> DecodeTile:
    """For ``rows`` query rows a request and KV head: (tokens x group). ``tree``: a mask's bits travel with the keys.
    ``gluon``: the kernel of `hopper_decode` can compute them.
    """
    found = _find("decode", chip, geometry, rows, load, gluon=gluon)
    block_m = min(64, power_of_two_from(max(16, rows)))
    if found is None:
        return _default_decode(chip, geometry, block_m, tree=tree)
    if found.get("gluon"):
        return DecodeTile(block_m, found["block_n"], found["warps"], 1, found["per_sm"], gluon=True)
    tile = DecodeTile(block_m, found["block_n"], found["warps"], found["stages"], found["per_sm"])
    while tile.stages > 1 and shared_bytes(geometry, tile, tree=tree) > chip.shared_memory:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def extend_tile(chip: Chip, geometry: Geometry, rows: int, *, tree: bool = False) -> ExtendTile:
    """For at most ``rows`` query rows a request and KV head. ``tree``: a mask's bits are read beside the keys."""
    found = _find("extend", chip, geometry, rows, None)
    if found is None:
        return _default_extend(chip, geometry, tree=tree)
    tile = ExtendTile(found["block_m"], found["block_n"], found["warps"], found["stages"], found["by_head"])
    while tile.stages > 1 and shared_bytes(geometry, tile, tree=tree) > chip.shared_memory:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def exact(geometry: Geometry) -> bool:
    """Whether products are of exact fp32, without tensor cores: every multiplication is an instruction of its own, and
    a tile of wide heads with many rows takes compilers half a minute.
    """
    return geometry.dtype.itemsize == 4


def shared_bytes(geometry: Geometry, tile: DecodeTile | ExtendTile, *, tree: bool) -> int:
    """Shared memory of a program, at most: queries, what its stages bring, and a tree's bits in the scores' layout."""
    queries = tile.block_m * sum(geometry.k_parts) * geometry.dtype.itemsize
    width = sum(geometry.k_parts) + (0 if geometry.values_in_keys else sum(geometry.v_parts))
    widened = 0 if geometry.kv_dtype.itemsize == geometry.dtype.itemsize else tile.block_n * geometry.key_bytes
    bits = tile.block_m * tile.block_n * 4 + 1024 if tree else 0
    return queries + tile.stages * tile.block_n * width * geometry.kv_dtype.itemsize + widened + bits


def _default_decode(chip: Chip, geometry: Geometry, block_m: int, *, tree: bool) -> DecodeTile:
    """The largest block that leaves room for what the pipeline holds; wide accumulators get more warps."""
    wide = block_m * sum(geometry.v_parts) > 64 * 128
    if exact(geometry):
        return _exact_decode(chip, geometry, block_m, tree=tree)
    for block_n, stages in ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2), (16, 1)):
        tile = DecodeTile(block_m, block_n, 8 if wide else 4, stages, 1)
        if shared_bytes(geometry, tile, tree=tree) <= 0.8 * chip.shared_memory:
            return tile
    return DecodeTile(16, 16, 8 if wide else 4, 1, 1)


def _exact_decode(chip: Chip, geometry: Geometry, block_m: int, *, tree: bool) -> DecodeTile:
    """The largest block of few enough multiplications a thread."""
    if geometry.width > 128:
        block_m = 16
    for block_n, stages in ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2), (16, 1)):
        products = block_m * block_n * geometry.width
        tile = DecodeTile(block_m, block_n, 4 if products <= 1024 * 4 * 32 else 8, stages, 1)
        few = products <= 1024 * tile.warps * 32 if geometry.width <= 128 else products <= 600 * 8 * 32
        if few and shared_bytes(geometry, tile, tree=tree) <= 0.8 * chip.shared_memory:
            return tile
    return DecodeTile(16, 16, 8, 1, 1)


def _default_extend(chip: Chip, geometry: Geometry, *, tree: bool) -> ExtendTile:
    width = geometry.width
    candidates: tuple[tuple[int, int, int, int], ...]
    if exact(geometry) and width > 128:
        candidates = ((32, 16, 8, 2),) if width <= 256 else ((16, 16, 8, 2), (16, 16, 8, 1))
    elif exact(geometry):
        candidates = ((32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1))
    elif width > 256:
        candidates = ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1))
    elif width > 128:
        candidates = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))
    else:
        candidates = ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1))
    for block_m, block_n, warps, stages in candidates:
        tile = ExtendTile(block_m, block_n, warps, stages, True)
        if shared_bytes(geometry, tile, tree=tree) <= 0.8 * chip.shared_memory:
            return tile
    return ExtendTile(16, 16, 4, 1, True)


def _find(
    table: str, chip: Chip, geometry: Geometry, rows: int, load: Load | None, *, gluon: bool = False
) -> Mapping[str, Any] | None:
    facts = {
        "kind": "mla" if geometry.values_in_keys else "mha",
        "item_bytes": geometry.dtype.itemsize,
        "cache_bytes": geometry.kv_dtype.itemsize,
        "load": load,
        "gluon": gluon,
    }
    if table in FORCED and (gluon or not FORCED[table].get("gluon")):
        return cast(Mapping[str, Any], FORCED[table])
    width = max(geometry.qk_dim, geometry.v_dim)
    for arch, entry in _tables()[table]:
        fits = all(entry[name] == value for name, value in facts.items() if name in entry)
        fits = fits and width <= entry.get("max_width", width) and rows <= entry.get("max_rows", rows)
        if fits and arch.allows(chip.arch):
            return entry
    return None


@functools.cache
def _tables() -> Mapping[str, tuple[tuple[ArchSpec, Mapping[str, Any]], ...]]:
    text = resources.files(__package__).joinpath("parameters.toml").read_text()
    return {
        name: tuple((ArchSpec.parse(entry["arch"]), entry) for entry in entries)
        for name, entries in tomllib.loads(text).items()
    }
