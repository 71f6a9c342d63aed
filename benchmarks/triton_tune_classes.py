"""The classes of shapes that an entry of attn-triton's parameters.toml is for, and what is tried beside each entry."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from attn_core.bench.shapes import SHAPES, Shape

#: Values by name, as an entry has them beside the facts that select it.
Candidate = dict[str, Any]
#: What an entry gives; everything else in it are facts.
PARAMETERS: Final = ("gluon", "block_m", "block_n", "warps", "stages", "per_sm", "by_head")


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """Shapes that share an entry of ``table``, the facts that select it, and what is tried. ``forced``: what makes the
    step take this entry where another kernel would be taken on this chip.
    """

    table: str
    facts: dict[str, Any]
    shapes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    kv: str = "auto"
    forced: tuple[tuple[str, Any], ...] = ()
    dtype: str = "bfloat16"


def _decode(
    block_n: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...], per_sm: tuple[int, ...]
) -> tuple[Candidate, ...]:
    names = ("block_n", "warps", "stages", "per_sm")
    return tuple(dict(zip(names, values, strict=True)) for values in itertools.product(block_n, warps, stages, per_sm))


def _gluon(keys: tuple[int, ...], *fill: tuple[int, int]) -> tuple[Candidate, ...]:
    """Tiles of the Gluon kernel over an fp8 cache: ``keys`` of each warp; pairs of warps and programs that share the
    registers of a multiprocessor.
    """
    return tuple(
        {"gluon": True, "block_n": n * warps, "warps": warps, "per_sm": programs}
        for n in keys
        for warps, programs in fill
    )


def _extend(*tiles: tuple[int, int, int, int]) -> tuple[Candidate, ...]:
    names = ("block_m", "block_n", "warps", "stages")
    return tuple(
        {**dict(zip(names, tile, strict=True)), "by_head": by_head} for tile in tiles for by_head in (True, False)
    )


_MHA: Final = {"kind": "mha", "item_bytes": 2, "cache_bytes": 2, "max_width": 128}
_MLA: Final = {"kind": "mla", "item_bytes": 2, "cache_bytes": 2, "max_width": 576}
_PLAIN: Final = (("gluon", False),)
_FEW: Final = ("decode bs1 kv8192", "decode bs16 kv4096")
_LONG: Final = ("decode bs8 kv65536",)
_MIXED: Final = ("decode bs64 kv128-32768 log-uniform",)
_FULL: Final = _gluon((16, 32), (1, 4), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2))

_EXACT: Final = {"item_bytes": 4, "cache_bytes": 4}
_CHAIN: Final = (8,) * 32, (4096 + 8,) * 32
#: Shapes of no published table: prompts and short chains of wide heads, for exact fp32.
MORE_SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("decode", "chain of 8 bs32 kv4096", *_CHAIN),
        Shape("decode", "chain of 8 bs32 kv4096, 256 wide", *_CHAIN, qk_head_dim=256, v_head_dim=256),
        Shape("extend", "extend bs8 q512, 256 wide", (512,) * 8, (512,) * 8, qk_head_dim=256, v_head_dim=256),
    )
}

CLASSES: Final[Mapping[str, ShapeClass]] = {
    "decode-few": ShapeClass(
        "decode", {**_MHA, "load": "few"}, _FEW, _decode((64, 128), (4, 8), (2, 3), (1, 2)),
    ),
    "decode-long": ShapeClass(
        "decode", {**_MHA, "load": "long"}, _LONG,
        (*_decode((64, 128), (4, 8), (3,), (1, 2)), *_decode((64,), (4,), (2, 4), (2, 3))),
    ),
    "decode-many": ShapeClass(
        "decode", {**_MHA, "load": "many"}, ("decode bs64 kv4096", "decode bs128 kv2048", "decode bs256 kv1024"),
        (*_decode((64,), (4,), (2, 3, 4), (1, 2, 3)), *_decode((64,), (8,), (4,), (2,)),
         *_decode((128,), (4, 8), (2, 3), (1, 2))),
    ),
    "decode-mixed": ShapeClass(
        "decode", {**_MHA, "load": "mixed"}, _MIXED,
        (*_decode((64,), (4,), (2, 3, 4), (1, 2, 3)), *_decode((128,), (4, 8), (2, 3), (1, 2))),
    ),
    "decode-fp8": ShapeClass(
        "decode", {**_MHA, "cache_bytes": 1},
        (*_FEW, "decode bs64 kv4096", "decode bs128 kv2048", *_LONG, *_MIXED),
        (*_decode((64, 128), (4, 8), (3,), (1, 2)), *_decode((64, 128), (4,), (2, 4), (2,))),
        kv="fp8_e4m3", forced=_PLAIN,
    ),
    "decode-fp8-few": ShapeClass(
        "decode", {"kind": "mha", "load": "few"}, _FEW, _gluon((16, 32), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)),
        kv="fp8_e4m3",
    ),
    "decode-fp8-long": ShapeClass("decode", {"kind": "mha", "load": "long"}, _LONG, _FULL, kv="fp8_e4m3"),
    "decode-fp8-many": ShapeClass(
        "decode", {"kind": "mha", "load": "many"}, ("decode bs64 kv4096", "decode bs128 kv2048"), _FULL, kv="fp8_e4m3",
    ),
    "decode-fp8-mixed": ShapeClass("decode", {"kind": "mha", "load": "mixed"}, _MIXED, _FULL, kv="fp8_e4m3"),
    "mla-few-rows": ShapeClass(
        "decode", {**_MLA, "max_rows": 16}, ("mla H16 bs1 kv8192", "mla H16 bs32 kv4096", "mla H16 bs128 kv4096"),
        (*_decode((16, 32), (4, 8), (2, 3), (1,)), *_decode((64,), (4, 8), (2,), (1,))), forced=_PLAIN,
    ),
    "mla": ShapeClass(
        "decode", _MLA, ("mla H128 bs1 kv8192", "mla H128 bs32 kv4096", "mla H128 bs128 kv4096"),
        (*_decode((32, 64), (8,), (1, 2), (1,)), *_decode((32,), (8,), (3,), (1,)), *_decode((32,), (4,), (2,), (1,))),
        forced=_PLAIN,
    ),
    # Exact fp32 has no entries. Beside the default: the tiles of before it was bounded by what compilers stand.
    "fp32-decode": ShapeClass(
        "decode", {"kind": "mha", **_EXACT}, ("decode bs64 kv4096",), _decode((32, 64), (8,), (2,), (1,)),
        dtype="float32",
    ),
    "fp32-chain": ShapeClass(
        "decode", {"kind": "mha", **_EXACT, "max_width": 128}, ("chain of 8 bs32 kv4096",),
        _decode((64,), (4,), (2,), (1,)), dtype="float32",
    ),
    "fp32-chain-wide": ShapeClass(
        "decode", {"kind": "mha", **_EXACT, "max_width": 256}, ("chain of 8 bs32 kv4096, 256 wide",),
        _decode((32,), (4,), (2,), (1,)), dtype="float32",
    ),
    "fp32-mla": ShapeClass(
        "decode", {"kind": "mla", **_EXACT}, ("mla H16 bs32 kv4096",), _decode((32,), (4,), (2,), (1,)),
        dtype="float32",
    ),
    "fp32-extend": ShapeClass(
        "extend", {"kind": "mha", **_EXACT, "max_width": 128}, ("extend bs8 q1024 pre0",),
        _extend((32, 16, 4, 2)), dtype="float32",
    ),
    "fp32-extend-wide": ShapeClass(
        "extend", {"kind": "mha", **_EXACT, "max_width": 256}, ("extend bs8 q512, 256 wide",),
        _extend((32, 32, 4, 2)), dtype="float32",
    ),
    "extend": ShapeClass(
        "extend", _MHA, tuple(name for name, shape in SHAPES.items() if shape.bench == "extend"),
        _extend((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 3)), forced=_PLAIN,
    ),
}  # fmt: skip


def shape_of(name: str) -> Shape:
    """A named shape of the benchmarks, or of MORE_SHAPES."""
    return MORE_SHAPES[name] if name in MORE_SHAPES else SHAPES[name]


def entries(arch: str) -> list[tuple[str, dict[str, Any], Candidate]]:
    """(table, facts, parameters) of every entry that the committed table has for ``arch``."""
    text = resources.files("attn_triton").joinpath("parameters.toml").read_text()
    return [
        (
            table,
            {key: value for key, value in entry.items() if key not in (*PARAMETERS, "arch")},
            {key: value for key, value in entry.items() if key in PARAMETERS},
        )
        for table, listed in tomllib.loads(text).items()
        for entry in listed
        if entry["arch"] == arch
    ]


def committed(of: ShapeClass, arch: str) -> Candidate | None:
    """What the committed table has for a class on ``arch``; None if it has nothing."""
    found = [
        candidate
        for table, facts, candidate in entries(arch)
        if table == of.table
        and facts == of.facts
        and candidate.get("gluon") == (of.candidates[0].get("gluon") if of.candidates else None)
    ]
    return found[0] if found else None


def label(candidate: Candidate) -> str:
    """A candidate in a few letters: g for Gluon, rows x keys, warps, stages, programs a multiprocessor or the order."""
    rows = f"{candidate['block_m']}x" if "block_m" in candidate else ""
    stages = f" s{candidate['stages']}" if "stages" in candidate else ""
    last = f" x{candidate['per_sm']}" if "per_sm" in candidate else " by head" if candidate["by_head"] else " longest"
    return (
        f"{'gluon ' if candidate.get('gluon') else ''}{rows}{candidate['block_n']} w{candidate['warps']}{stages}{last}"
    )
