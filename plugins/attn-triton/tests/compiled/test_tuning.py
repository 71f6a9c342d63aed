"""The tuning script and the committed table: which entry is confirmed by which shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attn_triton.ahead import CHIPS
from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, Strides
from attn_triton.parameters import decode_tile, extend_tile
from attn_triton.split import cut_keys

sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))
from triton_tune import as_toml, best_of, candidates_of, verdict  # type: ignore[import-not-found]
from triton_tune_classes import (  # type: ignore[import-not-found]
    CLASSES,
    Candidate,
    ShapeClass,
    committed,
    entries,
    label,
    shape_of,
)

HOPPER = Chip("sm_90", *CHIPS["sm_90"])
ENTRIES = {name: of for name, of in CLASSES.items() if committed(of, "sm_90") is not None}


def given_by_the_table(of: ShapeClass, shape: str) -> Candidate:
    """The launch parameters of a shape, by the names that an entry has."""
    named, strides = shape_of(shape), Strides(1, 1, 1)
    dtype = getattr(torch, of.dtype)
    kv_dtype = torch.float8_e4m3fn if of.kv == "fp8_e4m3" else dtype
    geometry = Geometry(
        named.num_kv_heads, named.num_q_heads // named.num_kv_heads, named.qk_head_dim, named.v_head_dim,
        named.kind == "mla", 16, strides, strides, dtype, kv_dtype,
    )  # fmt: skip
    rows = max(named.query_lens) * geometry.group
    gluon = of.kv != "auto" and not of.forced
    tile = extend_tile(HOPPER, geometry, rows)
    names = of.candidates[0]
    if of.table == "decode":
        cut = cut_keys(
            lambda load: decode_tile(HOPPER, geometry, rows, load, gluon=gluon), HOPPER.multiprocessors, geometry,
            batch=len(named.seq_lens), query_len=max(named.query_lens), most_keys=max(named.seq_lens),
            lengths=list(named.seq_lens), window=None,
        )  # fmt: skip
        return {name: getattr(cut.tile, name) for name in names}
    return {name: getattr(tile, name) for name in names}


def test_every_entry_for_hopper_has_one_class_that_measures_it() -> None:
    table = [(name, facts) for name, facts, _ in entries("sm_90")]
    classes = [(of.table, of.facts) for of in ENTRIES.values()]
    assert len(classes) == len(table) == 12
    assert all(facts in classes for facts in table)


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, of in ENTRIES.items() for shape in of.shapes])
def test_the_shapes_of_a_class_are_given_its_entry(name: str, shape: str) -> None:
    assert given_by_the_table(ENTRIES[name], shape) == committed(ENTRIES[name], "sm_90")


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_committed_is_tried_beside_others(name: str) -> None:
    tried = candidates_of(CLASSES[name], "sm_90")
    entry = committed(CLASSES[name], "sm_90")
    assert next(iter(tried)) == ("default" if entry is None else label(entry))
    assert len(tried) > 1
    assert len({tuple((c or {}).items()) for c in tried.values()}) == len(tried)


def rows(of: ShapeClass, times: dict[str, tuple[float, ...]]) -> list[dict[str, object]]:
    return [
        {"candidate": name, "shape": shape, "ms": ms}
        for name, listed in times.items()
        for shape, ms in zip(of.shapes, listed, strict=False)
    ]


@pytest.mark.parametrize(
    ("own", "other", "confirmed"), [((1.02, 1.03), (1.0, 1.0), True), ((1.1, 1.0), (1.0, 1.0), False)]
)
def test_an_entry_is_kept_within_three_percent_of_the_best_of_its_class(
    own: tuple[float, ...], other: tuple[float, ...], confirmed: bool
) -> None:
    of = ENTRIES["decode-few"]
    mine, another = list(candidates_of(of, "sm_90"))[:2]
    found = verdict("decode-few", of, "sm_90", rows(of, {mine: own, another: other}))
    assert (found["best"], found["confirmed"]) == (another, confirmed)
    assert found["ratio"] == pytest.approx((own[0] * own[1]) ** 0.5)
    assert label(found["take"]) == (mine if confirmed else another)


def test_a_candidate_that_did_not_run_at_every_shape_is_not_the_best() -> None:
    of = ENTRIES["decode-few"]
    mine, another = list(candidates_of(of, "sm_90"))[:2]
    best, means = best_of(of, rows(of, {mine: (2.0, 2.0), another: (1.0,)}))
    assert best == mine
    assert list(means) == [mine]


def test_a_class_that_was_not_measured_is_not_confirmed_and_keeps_its_entry() -> None:
    of = ENTRIES["mla"]
    found = verdict("mla", of, "sm_90", [])
    assert found["ratio"] is None
    assert found["confirmed"] is None
    assert found["take"] == committed(of, "sm_90")


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_written_as_the_table_has_it(name: str) -> None:
    import tomllib

    of, entry = ENTRIES[name], committed(ENTRIES[name], "sm_90")
    assert entry is not None
    assert tomllib.loads(as_toml(of, "sm_90", entry)) == {of.table: [{"arch": "sm_90", **of.facts, **entry}]}
