"""Cases: ids that round-trip, covering arrays that cover, and generation that leaves no claim of a clause out."""

from __future__ import annotations

from itertools import combinations

import pytest
from attn_core.errors import UsageError
from attn_core.planning.config import FEATURES, PHASES, LayerKind
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.testing.axes import TIERS
from attn_core.testing.cases import Case, Request, format_kind, parse_kind
from attn_core.testing.claimed import is_claimed, missing_codes
from attn_core.testing.covering import covering_rows
from attn_core.testing.generation import generate_cases, spread
from attn_core.testing.refusals import refusal_cases
from attn_core.testing.run import Target

CPU = System("cpu")

#: A decode-only backend of narrow means, as many kernels are.
NARROW = {
    "schema": 1,
    "name": "narrow",
    "protocol": ">=1.0,<2",
    "summary": "Decodes",
    "requires": {"host_lengths": True},
    "supports": [
        {
            "phases": ["decode", "verify"],
            "device": "any",
            "kind": "mha",
            "dtypes": ["bfloat16", "float16"],
            "head_dims": [[64, 64], {"min": 96, "max": 128, "multiple_of": 16}],
            "page_sizes": [{"multiple_of": 32, "max": 128}],
            "kv_layouts": ["HND"],
            "features": ["sliding_window", "verify_chain"],
            "max_group_size": 8,
            "max_draft_tokens": 3,
        }
    ],
}


@pytest.fixture(scope="module")
def narrow() -> Manifest:
    return Manifest.parse(NARROW)


@pytest.mark.parametrize(
    "kind",
    [
        LayerKind(8, 2, 64, 64),
        LayerKind(8, 2, 192, 128, sliding_window=16, softcap=1.5, sinks=True),
        LayerKind(16, 1, 576, 512, kind="mla", scale=0.1),
        LayerKind(4, 4, 80, 80, ragged=True, causal=False),
        LayerKind(4, 4, 80, 80, cross=True, scale=1 / 3),
    ],
)
def test_layer_kinds_survive_being_written(kind: LayerKind) -> None:
    assert parse_kind(format_kind(kind)) == kind


@pytest.mark.parametrize("tier", TIERS)
def test_ids_reproduce_their_cases(tier, target: Target) -> None:  # type: ignore[no-untyped-def]
    cases = generate_cases(target.ref.manifest, tier, CPU) + refusal_cases(target.ref.manifest, tier, CPU)
    assert len({case.id for case in cases}) == len(cases)
    assert all(Case.parse(case.id) == case for case in cases)


@pytest.mark.parametrize(
    "text",
    ["", "decode", "decode/8x2x64", "prefil/8x2x64/1@0", "decode/8x2x64/1@0/pagesize=3", "decode/8x2x64/1@0/lsee",
     "decode/8x2x64/1", "decode/8x2x64+windw=3/1@0", "decode/8x2x64+window=x/1@0", "decode/8x2x64/1@0/page_size=12x",
     "decode/8x2x64/1@0/batch=0", "decode/8x2x64/1@0/memory=upside", "verify/8x2x64/3@0/tree=oak",
     "decode/8x2x64/1@0/dtype=int8", "decode/8x2x64+window=-3/1@0", "decode/8x3x64/1@0", "decode/8x2x64/1@0/seed="],
)  # fmt: skip
def test_what_is_no_case_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Case.parse(text)


def test_a_pattern_repeats_up_to_the_batch() -> None:
    case = Case("decode", (LayerKind(2, 1, 8, 8),), (Request(1, 3), Request(1, 4)), batch=3)
    assert [r.prefix for r in case.requests] == [3, 4, 3]


def test_covering_rows_have_every_allowed_pair() -> None:
    axes = {"a": range(4), "b": range(3), "c": [False, True], "d": [False, True]}
    rows = covering_rows(axes, lambda row: not (row.get("a") == 1 and row.get("c")))
    pairs = {(x, row[x], y, row[y]) for row in rows for x, y in combinations(axes, 2)}
    for x, y in combinations(axes, 2):
        for i in axes[x]:
            for j in axes[y]:
                forbidden = (x, i, y, j) == ("a", 1, "c", True)
                assert ((x, i, y, j) in pairs) != forbidden
    assert len(rows) < 4 * 3 * 2 * 2


def test_every_claim_of_a_clause_is_tried(target: Target) -> None:
    manifest = target.ref.manifest
    cases = generate_cases(manifest, "contract", CPU)
    here = [clause for clause in manifest.clauses if "any" in clause.devices or "cpu" in clause.devices]
    for clause in here:
        mine = [c for c in cases if any(k.kind == clause.kind for k in c.kinds)]
        for feature in clause.features - {"cuda_graph"}:
            assert any(c.features == {feature} for c in mine if c.mode != "verify") or feature.startswith("verify")
            assert any(feature in c.features for c in mine)
        assert {c.dtype for c in mine} == set(clause.dtypes)
        assert {c.kv_dtype for c in mine} == set(clause.kv_dtypes)
        assert {c.layout for c in mine} == set(clause.kv_layouts)
        assert {phase for c in mine for phase in c.phases} == set(clause.phases)
        assert {k.group_size for c in mine for k in c.kinds} >= {1, 3, 4, 7, 8, 16}
        assert {c.batch for c in mine if c.mode == "decode"} == {1, 2, 7, 33}


def test_features_meet_in_pairs(target: Target) -> None:
    cases = generate_cases(target.ref.manifest, "contract", CPU)
    met = {frozenset(pair) for c in cases for pair in combinations(sorted(c.features), 2)}
    never = {("cross", "sliding_window"), ("bidirectional_spans", "cross"), ("bidirectional_spans", "ragged")}
    never |= {("bidirectional_spans", f"verify_{t}") for t in ("chain", "tree")} | {("verify_chain", "verify_tree")}
    never |= {("cross", "ragged"), ("ragged", "verify_chain"), ("ragged", "verify_tree"), ("ragged", "sliding_window")}
    declared = {f for clause in target.ref.manifest.clauses if clause.devices == ("any",) for f in clause.features}
    for pair in combinations(sorted(declared), 2):
        assert frozenset(pair) in met or pair in never, pair


def test_lengths_lie_around_the_page_and_windows_around_the_sequence(target: Target) -> None:
    cases = [
        c for c in generate_cases(target.ref.manifest, "contract", CPU) if c.mode == "decode" and c.page_size == 16
    ]
    lengths = {r.seq_len for c in cases for r in c.requests}
    assert lengths >= {1, 15, 16, 17}
    assert max(lengths) > 160
    windows = {k.sliding_window for c in cases for k in c.kinds}
    assert windows >= {None, 1, 16}
    assert max(w for w in windows if w) > max(lengths)


def test_a_narrow_manifest_is_tried_at_its_edges_and_nowhere_else(narrow: Manifest) -> None:
    cases = generate_cases(narrow, "numerics", CPU)
    assert {c.mode for c in cases} == {"decode", "verify"}
    assert {(k.qk_head_dim, k.v_head_dim) for c in cases for k in c.kinds} == {(64, 64), (96, 96), (128, 128)}
    assert {c.page_size for c in cases} == {32, 64, 128}
    assert max(k.group_size for c in cases for k in c.kinds) == 8
    assert {c.draft_tokens for c in cases if c.mode == "verify"} == {3}
    assert not any("nohost" in c.options for c in cases)
    assert all(is_claimed(narrow, c, CPU) for c in cases)


def test_pages_that_are_split_are_tried_where_they_can_be() -> None:
    clause = {**NARROW["supports"][0], "page_sizes": [16, 64], "kv_layouts": ["NHD", "HND"]}  # type: ignore[index]
    manifest = Manifest.parse({**NARROW, "supports": [clause]})
    cases = generate_cases(manifest, "contract", CPU)
    split = [case for case in cases if case.page_size == 48]
    assert {case.page_size for case in cases} == {16, 48, 64}
    assert len(split) > 5
    assert {case.layout for case in split} == {"NHD"}
    assert not any(case.options & {"stacked", "joined"} for case in split)


def test_whatever_is_not_claimed_is_to_be_refused(narrow: Manifest) -> None:
    refused = refusal_cases(narrow, "contract", CPU)
    assert {c.refused for c in refused} == {
        "phase_unsupported", "feature_unsupported", "dtype_unsupported", "kv_dtype_unsupported", "head_dim_unsupported",
        "group_size_unsupported", "page_size_unsupported", "kv_layout_unsupported",
    }  # fmt: skip
    lacking = {f for f in FEATURES if f not in narrow.features} - {"bidirectional_spans", "ragged"}  # of prefill alone
    assert {f for c in refused if c.refused == "feature_unsupported" for f in c.features} >= lacking
    assert {p for c in refused if c.refused == "phase_unsupported" for p in c.phases} == {"prefill", "draft"}
    assert not any(is_claimed(narrow, c, CPU) for c in refused)


def test_each_feature_of_each_phase_is_either_proved_or_refused(narrow: Manifest) -> None:
    positive = {(p, f) for c in generate_cases(narrow, "contract", CPU) for p in c.phases for f in c.features}
    negative = {(p, f) for c in refusal_cases(narrow, "contract", CPU) for p in c.phases for f in c.features}
    phases = {p for c in refusal_cases(narrow, "contract", CPU) if c.refused == "phase_unsupported" for p in c.phases}
    for phase in PHASES:
        assert phase in phases or {f for p, f in positive | negative if p == phase} >= {"lse", "softcap", "sinks"}
    assert not {(p, f) for p, f in positive if f not in narrow.features}


def test_the_kits_reading_of_a_manifest_and_the_planners_agree(narrow: Manifest, target: Target) -> None:
    for manifest in (narrow, target.ref.manifest):
        for case in refusal_cases(manifest, "contract", CPU) + generate_cases(manifest, "contract", CPU)[:200]:
            decisions = [evaluate(manifest, case.config(), phase, CPU) for phase in case.phases]
            accepted = all(decision.accepted for decision in decisions)
            assert accepted == is_claimed(manifest, case, CPU), case.id
            assert all(d.reasons[0].code in missing_codes(manifest, case, CPU) for d in decisions if not d.accepted)


def test_a_spread_keeps_what_there_is_to_show(target: Target) -> None:
    cases = generate_cases(target.ref.manifest, "contract", CPU)
    some = spread(cases, 120)
    assert len(some) == 120
    assert {c.mode for c in some} == {c.mode for c in cases}
    assert {f for c in some for f in c.features} == {f for c in cases for f in c.features}
    assert spread(cases, None) == cases
