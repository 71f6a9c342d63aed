"""`evaluate` as tables: what one clause accepts, what is refused and why, and what layer kinds must share."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from attn_core.planning.config import FEATURES, AttentionConfig, LayerKind, Phase
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import CODES, LAYERS, Decision, Reason, availability, evaluate, reason
from attn_core.planning.system import System
from hypothesis import given, settings
from hypothesis import strategies as st

from .building import BLACKWELL, CPU, HOPPER, MHA, MLA, TOWER, clause, config, manifest, mla_clause


def codes(decision: Decision) -> list[str]:
    return [r.code for r in decision.reasons]


def judge(
    made: Manifest, wanted: AttentionConfig | None = None, phase: Phase = "decode", system: System = HOPPER
) -> Decision:
    return evaluate(made, wanted or config(), phase, system)


def test_what_one_clause_accepts_is_accepted() -> None:
    decision = judge(manifest())
    assert decision.accepted
    assert decision.reasons == ()
    assert decision.layouts == ("NHD",)
    assert [n for n in (1, 8, 16, 32, 64) if decision.pages.allows(n)] == [16, 32]
    assert (decision.page_size, decision.native_page_size, decision.clauses) == (None, None, (0,))


KV8 = replace(MHA, num_q_heads=64, num_kv_heads=4)


@pytest.mark.parametrize(
    ("clause_changes", "wanted", "code", "field", "value"),
    [
        ({"device": "rocm"}, config(), "device_mismatch", "device", "cuda"),
        ({"arch": "<sm_90"}, config(), "arch_mismatch", "arch", "sm_90"),
        ({}, config(MLA), "kind_unsupported", "kind", "mla"),
        ({"phases": ["prefill"]}, config(), "phase_unsupported", "phase", "decode"),
        ({}, config(dtype="float32"), "dtype_unsupported", "dtype", "float32"),
        ({}, config(kv_cache_dtype="fp8_e4m3"), "kv_dtype_unsupported", "kv_cache_dtype", "fp8_e4m3"),
        ({"head_dims": [[64, 64]]}, config(), "head_dim_unsupported", "head_dim", "128/128"),
        ({"max_group_size": 8}, config(KV8), "group_size_unsupported", "group_size", "16"),
        ({}, config(kv_layout="HND"), "kv_layout_unsupported", "kv_layout", "HND"),
        ({}, config(page_size=8), "page_size_unsupported", "page_size", "8"),
        ({}, config(replace(MHA, softcap=30.0)), "feature_unsupported", "features", "softcap"),
        ({}, config(replace(MHA, sliding_window=8)), "feature_unsupported", "features", "sliding_window"),
        ({}, config(replace(MHA, sinks=True)), "feature_unsupported", "features", "sinks"),
        ({}, config(replace(MHA, cross=True)), "feature_unsupported", "features", "cross"),
        ({}, config(lse=True), "feature_unsupported", "features", "lse"),
        ({}, config(cuda_graph=True), "feature_unsupported", "features", "cuda_graph"),
        ({}, config(deterministic=True), "feature_unsupported", "features", "deterministic"),
        ({}, config(batch_invariant=True), "feature_unsupported", "features", "batch_invariant"),
        (
            {"page_sizes": None, "kv_layouts": None, "features": ["ragged"]},
            config(), "kind_unsupported", "kind", "mha with a cache",
        ),
    ],
)  # fmt: skip
def test_each_thing_that_fails_alone_is_one_reason_with_what_was_wanted(
    clause_changes: dict[str, Any], wanted: AttentionConfig, code: str, field: str, value: str
) -> None:
    decision = judge(manifest("one", clause(**clause_changes)), wanted)
    assert not decision.accepted
    (only,) = decision.reasons
    assert (only.code, only.field, only.wanted, only.kind) == (code, field, value, None)
    assert only.layer == CODES[code][0]
    assert only.have


@pytest.mark.parametrize(
    ("phase", "wanted", "feature"),
    [
        ("prefill", config(bidirectional_spans=True), "bidirectional_spans"),
        ("prefill", config(MHA, TOWER), "ragged"),
        ("verify", config(speculative_num_draft_tokens=4), "verify_chain"),
        ("verify", config(speculative_num_draft_tokens=4, speculative_eagle_topk=2), "verify_tree"),
    ],
)
def test_features_are_asked_for_in_the_phase_that_needs_them(
    phase: Phase, wanted: AttentionConfig, feature: str
) -> None:
    phases: list[Phase] = ["prefill", "decode", "verify", "draft"]
    without = manifest("one", clause(phases=phases, head_dims="any"))
    having = manifest("one", clause(phases=phases, head_dims="any", features=[feature]))
    assert [r.wanted for r in judge(without, wanted, phase).reasons] == [feature]
    assert judge(having, wanted, phase).accepted
    assert judge(without, wanted, "decode").accepted


def test_a_verify_step_may_have_as_many_draft_tokens_as_the_clause_says() -> None:
    made = manifest("one", clause(phases=["decode", "verify"], features=["verify_chain"], max_draft_tokens=4))
    assert judge(made, config(speculative_num_draft_tokens=4), "verify").accepted
    refused = judge(made, config(speculative_num_draft_tokens=5), "verify")
    assert [(r.code, r.wanted, r.have) for r in refused.reasons] == [("draft_tokens_unsupported", "5", "up to 4")]
    assert judge(made, config(speculative_num_draft_tokens=5), "decode").accepted


def test_a_feature_that_another_clause_has_does_not_count() -> None:
    made = manifest("one", clause(head_dims=[[64, 64]], features=["softcap"]), clause())
    assert codes(judge(made, config(replace(MHA, softcap=1.0)))) == ["feature_unsupported"]


def test_everything_that_fails_in_the_nearest_clause_is_listed_root_cause_first() -> None:
    made = manifest("one", clause(phases=["decode"]), clause(device="rocm"))
    wanted = config(
        replace(MHA, qk_head_dim=64, v_head_dim=64, sliding_window=4, softcap=2.0),
        dtype="float32",
        page_size=1,
        kv_layout="HND",
    )
    assert codes(judge(made, wanted, "prefill")) == [
        "phase_unsupported", "dtype_unsupported", "head_dim_unsupported", "kv_layout_unsupported",
        "page_size_unsupported", "feature_unsupported", "feature_unsupported",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("clauses", "wanted", "expected"),
    [
        # the second gets as far as the head, the first fails at the dtype
        ([clause(dtypes=["float32"]), clause(head_dims=[[64, 64]])], config(), ["head_dim_unsupported"]),
        ([clause(arch=">=sm_100"), clause(page_sizes=[64])], config(page_size=16), ["page_size_unsupported"]),
        ([clause(kind="mla", kv_layouts=None), clause(phases=["prefill"])], config(), ["phase_unsupported"]),
        # both fail at the dtype first, the second in less
        (
            [clause(dtypes=["float32"], head_dims=[[64, 64]]), clause(dtypes=["float32"])],
            config(),
            ["dtype_unsupported"],
        ),
    ],
)
def test_the_nearest_clause_is_the_one_that_gets_furthest(
    clauses: list[dict[str, Any]], wanted: AttentionConfig, expected: list[str]
) -> None:
    assert codes(judge(manifest("one", *clauses), wanted)) == expected


def test_the_root_cause_names_what_like_clauses_accept_too() -> None:
    made = manifest("one", clause(head_dims=[[64, 64]]), clause(head_dims=[[96, 96], [256, 256]]))
    (only,) = judge(made).reasons
    assert only.have == "64/64 or 96/96, 256/256"


def test_a_device_that_no_clause_is_for_is_the_single_reason_of_the_clauses() -> None:
    decision = judge(manifest("one", clause(dtypes=["float32"]), clause(device=["rocm", "npu"])), system=CPU)
    (only,) = decision.reasons
    assert (only.code, only.wanted, only.have) == ("device_mismatch", "cpu", "cuda, rocm, npu")


def test_a_clause_for_any_device_is_for_this_one() -> None:
    assert judge(manifest("one", clause(device="any")), system=System("xpu", dists={})).accepted


def test_an_unknown_chip_is_refused_with_how_to_name_it() -> None:
    (only,) = judge(manifest("one", clause(arch=">=sm_80")), system=System("cuda", dists={})).reasons
    assert (only.code, only.wanted) == ("arch_mismatch", "unknown")
    assert only.hint == "name it with ATTN_FORCE_SYSTEM=cuda:ARCH"


@pytest.mark.parametrize(
    ("dists", "expected"),
    [
        ({"kernels": "1.5"}, []),
        ({"kernels": "0.5"}, ["dist_version"]),
        ({}, ["missing_dist"]),
    ],
)
def test_required_distributions_are_judged_on_this_machine(dists: dict[str, str], expected: list[str]) -> None:
    made = manifest("one", requires={"dists": ["kernels>=1"]})
    decision = judge(made, system=replace(HOPPER, dists=dists))
    assert (codes(decision), decision.accepted) == (expected, not expected)
    assert decision.notes == ()
    assert all("pip install 'kernels>=1'" in str(r) for r in decision.reasons)


def test_required_distributions_are_noted_and_not_judged_on_a_machine_that_is_not_here() -> None:
    made = manifest("one", requires={"dists": ["kernels>=1", "other"]})
    decision = judge(made, system=System.parse("cuda:sm_90"))
    assert decision.accepted
    assert [r.code for r in decision.notes] == ["missing_dist", "missing_dist"]


def test_installing_is_not_suggested_for_a_device_that_it_would_not_help() -> None:
    made = manifest("one", requires={"dists": ["kernels>=1"]})
    missing, device = judge(made, system=CPU).reasons
    assert (missing.code, missing.hint, device.code) == ("missing_dist", None, "device_mismatch")


def test_layers_run_installed_protocol_device_static() -> None:
    made = manifest("one", clause(arch=">=sm_100", dtypes=["float32"]), protocol=">=2", requires={"dists": ["kernels"]})
    assert [r.layer for r in judge(made).reasons] == ["installed", "protocol", "device", "static"]
    assert codes(judge(made)) == ["missing_dist", "protocol_mismatch", "arch_mismatch", "dtype_unsupported"]


PAGES = clause(page_sizes=[1, 16, 48], kv_layouts=["NHD", "HND"])


@pytest.mark.parametrize(
    ("changes", "layout", "page_size", "native"),
    [
        ({"page_sizes": [1, 16, 48]}, "NHD", 16, 16),
        ({"page_sizes": [1, 16, 48]}, "NHD", 32, 16),
        ({"page_sizes": [1, 16, 48]}, "NHD", 96, 48),
        ({"page_sizes": [1, 16, 48]}, "NHD", 7, 1),
        ({"page_sizes": [16, 48]}, "NHD", 8, None),
        ({"page_sizes": [16], "kv_layouts": ["HND"]}, "HND", 16, 16),
        ({"page_sizes": [16], "kv_layouts": ["HND"]}, "HND", 32, None),
        ({"page_sizes": {"multiple_of": 16}}, "NHD", 65536, 65536),
        ({"page_sizes": {"power_of_two": True}}, "NHD", 48, 16),
    ],
)
def test_a_page_size_is_native_or_converted_to_its_largest_native_divisor(
    changes: dict[str, Any], layout: str, page_size: int, native: int | None
) -> None:
    decision = judge(manifest("one", clause(**changes)), config(page_size=page_size))
    assert decision.accepted is (native is not None)
    assert decision.native_page_size == native
    assert decision.converted is (native is not None and native != page_size) or not decision.accepted
    assert decision.allows(page_size, layout) is (native is not None)


def test_mla_pages_can_be_split_too() -> None:
    assert judge(manifest("one", mla_clause(page_sizes=[32])), config(MLA, page_size=64)).native_page_size == 32


def test_a_page_that_could_be_split_but_for_its_layout_says_so() -> None:
    made = manifest("one", clause(page_sizes=[16], kv_layouts=["HND"]))
    (only,) = judge(made, config(page_size=64)).reasons
    assert only.code == "page_size_unsupported"
    assert only.hint is not None
    assert "NHD" in only.hint
    assert "16" in only.hint


def test_a_page_size_out_of_reach_suggests_one_that_is_not() -> None:
    (only,) = judge(manifest("one", clause(page_sizes=[64, 128])), config(page_size=16)).reasons
    assert (only.have, only.hint) == ("64, 128", "try 64")


def test_where_one_layout_can_be_split_and_the_other_not_only_the_first_is_left() -> None:
    both = manifest("one", clause(page_sizes=[16], kv_layouts=["NHD", "HND"]))
    assert judge(both, config(page_size=64)).layouts == ("NHD",)
    assert judge(both, config(page_size=16)).layouts == ("NHD", "HND")
    assert judge(both, config(kv_layout="HND")).layouts == ("HND",)


WINDOW = replace(MHA, sliding_window=128)


def test_layer_kinds_may_be_taken_by_different_clauses() -> None:
    made = manifest("one", clause(page_sizes=[64]), clause(page_sizes=[16, 64], features=["sliding_window"]))
    decision = judge(made, config(MHA, WINDOW))
    assert decision.accepted
    assert list(decision.pages) == [16, 64]  # the second clause takes both kinds
    assert judge(made, config(MHA, WINDOW, page_size=64)).clauses == (0, 1)
    assert judge(made, config(MHA, WINDOW, page_size=16)).clauses == (1, 1)


def test_a_kind_that_is_refused_is_named_by_its_index() -> None:
    decision = judge(manifest(), config(MHA, WINDOW))
    assert [(r.code, r.wanted, r.kind) for r in decision.reasons] == [("feature_unsupported", "sliding_window", 1)]
    assert "layer kind 1" in str(decision.reasons[0])


def test_what_fails_for_all_kinds_is_said_once_for_all() -> None:
    decision = judge(manifest(), config(MHA, WINDOW, dtype="float32"))
    assert [(r.code, r.kind) for r in decision.reasons] == [("dtype_unsupported", None), ("feature_unsupported", 1)]


SMALL = clause(features=["sliding_window"], head_dims=[[64, 64]])


@pytest.mark.parametrize(
    ("clauses", "text"),
    [
        ([clause(page_sizes=[16]), {**SMALL, "page_sizes": [64]}], "kind 0: NHD 16 | kind 1: NHD 64"),
        ([clause(kv_layouts=["HND"]), SMALL], "kind 0: HND 16, 32 | kind 1: NHD 16, 32"),
    ],
)
def test_kinds_that_share_no_page_size_and_layout_are_no_plan(clauses: list[dict[str, Any]], text: str) -> None:
    small = replace(WINDOW, qk_head_dim=64, v_head_dim=64)
    decision = judge(manifest("one", *clauses), config(MHA, small))
    assert [(r.code, r.have) for r in decision.reasons] == [("no_common_cache", text)]


def test_kinds_share_what_each_of_them_is_given_by_some_clause() -> None:
    made = manifest("one", clause(page_sizes=[16]), clause(page_sizes=[64], features=["sliding_window"]))
    assert list(judge(made, config(MHA, WINDOW)).pages) == [64]


def test_mha_and_mla_layers_cannot_share_one_cache() -> None:
    assert codes(judge(manifest("one", clause(), mla_clause()), config(MHA, MLA))) == ["no_common_cache"]


def test_kinds_are_converted_to_a_native_size_that_all_of_them_have() -> None:
    small = replace(WINDOW, qk_head_dim=64, v_head_dim=64)
    made = manifest(
        "one", clause(page_sizes=[8, 32]), clause(page_sizes=[8, 16], head_dims=[[64, 64]], features=["sliding_window"])
    )
    assert judge(made, config(MHA, small, page_size=32)).native_page_size == 8
    assert codes(judge(made, config(MHA, small, page_size=4))) == ["page_size_unsupported", "page_size_unsupported"]


def test_the_clause_of_a_kind_is_one_that_has_the_native_size() -> None:
    made = manifest("one", clause(page_sizes=[32]), clause(page_sizes=[16], features=["sliding_window"]))
    decision = judge(made, config(MHA, WINDOW, page_size=32))
    assert (decision.native_page_size, decision.clauses) == (16, (1, 1))


def test_ragged_layers_have_no_cache_to_judge_and_run_in_prefill_only() -> None:
    ragged = clause(page_sizes=None, kv_layouts=None, features=["ragged"], head_dims=[[72, 72]])
    wanted = config(MHA, TOWER, kv_cache_dtype="fp8_e4m3", page_size=16)
    made = manifest("one", clause(kv_dtypes=["fp8_e4m3"]), ragged)
    assert judge(made, wanted, "prefill").clauses == (0, 1)
    assert judge(made, wanted, "decode").clauses == (0, None)


def test_a_phase_in_which_nothing_is_cached_leaves_every_cache_open() -> None:
    made = manifest("one", clause(page_sizes=None, kv_layouts=None, features=["ragged"], head_dims="any"))
    decision = judge(made, config(TOWER), "prefill")
    assert decision.accepted
    assert decision.layouts == ("NHD", "HND", "MLA")
    assert decision.pages.allows(1)


def test_availability_is_what_stands_against_any_use() -> None:
    made = manifest(
        "one", clause(arch=">=sm_100"), clause(arch="sm_75"), requires={"dists": ["kernels"]}, protocol=">=2"
    )
    assert [r.code for r in availability(made, HOPPER)] == ["missing_dist", "protocol_mismatch", "arch_mismatch"]
    assert [r.code for r in availability(made, CPU)] == ["missing_dist", "protocol_mismatch", "device_mismatch"]
    assert availability(manifest(), BLACKWELL) == ()


def test_a_reason_must_be_of_the_closed_set() -> None:
    with pytest.raises(KeyError):
        reason("no_such_code", "x", 1, 2)
    assert all(layer in LAYERS for layer, _ in CODES.values())


def test_a_reason_reads_as_a_sentence_and_carries_its_parts() -> None:
    made = Reason("page_size_unsupported", "page_size", "8", "16, 32", "try 16", "static", 1)
    assert str(made) == "page_size_unsupported: page_size 8 (layer kind 1), accepted: 16, 32; try 16"
    assert made.to_json()["have"] == "16, 32"


kinds = st.builds(
    LayerKind,
    num_q_heads=st.sampled_from([8, 16]),
    num_kv_heads=st.sampled_from([1, 8]),
    qk_head_dim=st.sampled_from([64, 128]),
    v_head_dim=st.sampled_from([64, 128]),
    sliding_window=st.sampled_from([None, 4]),
    softcap=st.sampled_from([0.0, 30.0]),
)
configs = st.builds(
    AttentionConfig,
    layers=st.lists(kinds, min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    page_size=st.sampled_from([None, 1, 16, 48, 64]),
    kv_layout=st.sampled_from([None, "NHD", "HND"]),
    speculative_num_draft_tokens=st.sampled_from([0, 4]),
)
clauses = st.builds(
    clause,
    phases=st.lists(st.sampled_from(["prefill", "decode", "verify"]), min_size=1),
    device=st.sampled_from(["cuda", "cpu", "any"]),
    arch=st.sampled_from([None, ">=sm_80", ">=sm_100"]),
    dtypes=st.sampled_from([["bfloat16"], ["bfloat16", "float32"]]),
    head_dims=st.sampled_from(["any", [[64, 64]], [[128, 128], [64, 128]]]),
    page_sizes=st.sampled_from(["any", [1], [16, 48], {"multiple_of": 16}]),
    kv_layouts=st.sampled_from([["NHD"], ["HND"], ["NHD", "HND"]]),
    features=st.lists(st.sampled_from(sorted(FEATURES)), max_size=4),
)


@settings(deadline=None)
@given(st.lists(clauses, min_size=1, max_size=3), configs, st.sampled_from(["prefill", "decode", "verify"]))
def test_every_decision_is_pure_and_total(made: list[dict[str, Any]], wanted: AttentionConfig, phase: Phase) -> None:
    parsed = manifest("one", *made)
    before = copy.deepcopy((parsed, wanted))
    decision = evaluate(parsed, wanted, phase, HOPPER)
    assert decision == evaluate(parsed, wanted, phase, HOPPER)
    assert (parsed, wanted) == before
    assert decision.accepted is not bool(decision.reasons)
    order = [LAYERS.index(r.layer) for r in decision.reasons]
    assert order == sorted(order)
    if decision.accepted:
        running = wanted.kinds(phase)
        assert all(
            (c is not None) is (kind in running) for c, kind in zip(decision.clauses, wanted.layers, strict=True)
        )
        assert decision.caches
        for c, kind in zip(decision.clauses, wanted.layers, strict=True):
            assert c is not None
            assert wanted.features(kind, phase) <= parsed.clauses[c].features
            if decision.native_page_size is not None:
                assert parsed.clauses[c].pages.allows(decision.native_page_size)
                assert decision.layouts[0] in parsed.clauses[c].kv_layouts
