"""The plan: what `auto` chooses, what a name binds, one cache for all phases, and a trace that leaves nobody out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from attn_core.errors import (
    AmbiguousBackendError,
    AttnError,
    BackendRefusedError,
    ConfigError,
    NoBackendError,
    NoCommonCacheError,
    PluginError,
    ProtocolError,
    UnknownBackendError,
    UsageError,
)
from attn_core.planning.config import PHASES, AttentionConfig, Phase
from attn_core.planning.discovery import BackendRef, Problem
from attn_core.planning.measured import Timing, save_timings, shape_key, tuned_path
from attn_core.planning.plan import Plan, parse_backend, plan
from attn_core.planning.reasons import reason
from attn_core.planning.system import System

from .building import BLACKWELL, CPU, HOPPER, MHA, MLA, TOWER, broken, clause, config, installed, mla_clause, ref

NATIVE = ref("torch_native", clause(device="any", page_sizes="any", kv_layouts=["NHD", "HND"]), dist="attn-core")


def made(
    *items: BackendRef | Problem, wanted: AttentionConfig | None = None, backend: Any = "auto",
    system: System = HOPPER, **options: Any,
) -> Plan:  # fmt: skip
    return plan(wanted or config(), backend, system=system, installed=installed(*items), **options)


def chosen(result: Plan) -> dict[str, str]:
    return {phase: planned.backend.listed for phase, planned in result.phases.items()}


def statuses(result: Plan, phase: Phase = "decode") -> dict[str, str]:
    return {candidate.listed: candidate.status for candidate in result.trace[phase]}


def rows(result: Plan, phase: Phase = "decode") -> dict[str, str]:
    return {candidate.listed: str(candidate) for candidate in result.trace[phase]}


def test_auto_follows_the_preference_table() -> None:
    found = made(NATIVE, ref("flashinfer"), ref("fa3"))
    assert chosen(found) == {"prefill": "fa3", "decode": "fa3"}
    assert found.phases["decode"].why == "preferred for cuda >=sm_90,<sm_100 mha"
    assert not found.phases["decode"].named
    assert [candidate.listed for candidate in found.trace["decode"]][:3] == ["fa3", "flashinfer", "torch_native"]


@pytest.mark.parametrize(
    ("system", "wanted", "expected"),
    [
        ("cuda:sm_90", config(), "fa3"),
        ("cuda:sm_100", config(), "flashinfer"),
        ("cuda:sm_80", config(), "flashinfer"),
        ("cuda:sm_120", config(), "flashinfer"),
        ("rocm:gfx942", config(), "wave"),
        ("npu:ascend910b", config(), "ascend"),
        ("cpu", config(), "torch_native"),
        ("xpu", config(), "triton"),
        ("cuda:sm_100", config(MLA), "trtllm_mla"),
        ("cuda:sm_90", config(MLA), "flashinfer_mla"),
        ("cuda:sm_80", config(MLA), "flashinfer_mla"),
    ],
)
def test_each_device_has_its_preferred_backend(system: str, wanted: AttentionConfig, expected: str) -> None:
    every = [clause(device="any"), mla_clause(device="any")]
    names = ["fa3", "flashinfer", "flashinfer_mla", "trtllm_mla", "triton", "wave", "ascend", "torch_native", "zebra"]
    found = made(*(ref(name, *every) for name in names), system=System.parse(system), wanted=wanted)
    assert chosen(found)["decode"] == expected
    here = [row.listed for row in found.trace["decode"] if row.status != "not_installed"]
    assert here[0 if expected == "torch_native" else -1] == "torch_native"


def test_what_the_table_does_not_know_comes_after_it_and_torch_native_last() -> None:
    found = made(NATIVE, ref("zebra"), ref("antelope"), ref("fa3"))
    assert list(statuses(found))[:4] == ["fa3", "antelope", "zebra", "torch_native"]
    assert "not in the preference table" in rows(found)["antelope"]


def test_on_a_cpu_torch_native_comes_before_what_the_table_does_not_know() -> None:
    assert chosen(made(NATIVE, ref("zebra", clause(device="cpu")), system=CPU))["decode"] == "torch_native"


def test_auto_never_takes_what_cannot_be_imported_here() -> None:
    found = made(NATIVE, ref("fa3", requires={"dists": ["kernels"]}))
    assert chosen(found)["decode"] == "torch_native"
    assert "missing_dist: kernels (not installed); pip install 'kernels'" in rows(found)["fa3"]


def test_a_machine_that_is_not_here_is_planned_as_if_its_libraries_were_there() -> None:
    found = made(NATIVE, ref("fa3", requires={"dists": ["kernels"]}), system=System.parse("cuda:sm_90"))
    assert chosen(found)["decode"] == "fa3"
    assert "not judged here: missing_dist: kernels" in found.explain()


def test_a_named_backend_is_used() -> None:
    found = made(NATIVE, ref("fa3"), ref("flashinfer"), backend="flashinfer")
    assert chosen(found) == {"prefill": "flashinfer", "decode": "flashinfer"}
    assert found.phases["decode"].why == "named"
    assert found.phases["decode"].named
    assert statuses(found)["fa3"] == "accepted"
    assert "not asked for" in rows(found)["fa3"]


@pytest.mark.parametrize("backend", ["prefill=fa3,decode=flashinfer", {"prefill": "fa3", "decode": "flashinfer"}])
def test_phases_can_be_named_apart(backend: Any) -> None:
    assert chosen(made(NATIVE, ref("fa3"), ref("flashinfer"), backend=backend)) == {
        "prefill": "fa3",
        "decode": "flashinfer",
    }


def test_a_phase_that_is_not_named_is_auto() -> None:
    assert chosen(made(ref("fa3"), ref("flashinfer"), backend={"decode": "flashinfer"})) == {
        "prefill": "fa3",
        "decode": "flashinfer",
    }


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("prefil=fa3", ["'prefil' is no phase", "did you mean 'prefill'?"]),
        ("prefill=", ["malformed at prefill"]),
        ("prefill=fa3,prefill=fa3", ["malformed at prefill"]),
        ("fa3,flashinfer", ["malformed", "phase=name"]),
        ("", ["malformed"]),
        ("prefill=fa3,", ["no phase"]),
        ({"encode": "fa3"}, ["'encode' is no phase"]),
        (["fa3"], ["backend ['fa3']", "a mapping of phases"]),
    ],
)
def test_a_malformed_choice_of_backends_is_refused(backend: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_backend(backend)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_machine_may_be_given_as_its_text() -> None:
    config = AttentionConfig.preset("smollm2-135m")
    assert plan(config, system="cuda:sm_90").system == System.parse("cuda:sm_90")
    with pytest.raises(UsageError, match="is no CUDA architecture"):
        plan(config, system="cuda:90")


def test_auto_in_any_form_names_nothing() -> None:
    assert parse_backend("auto") == parse_backend({"decode": "auto"}) == parse_backend("prefill=auto,decode=auto") == {}
    assert parse_backend(" fa3 ") == dict.fromkeys(PHASES, "fa3")


def test_a_named_backend_that_cannot_is_refused_with_all_its_reasons() -> None:
    with pytest.raises(BackendRefusedError) as caught:
        made(NATIVE, ref("fa3"), wanted=config(replace(MHA, softcap=1.0), dtype="float32"), backend="fa3")
    assert "dtype_unsupported" in str(caught.value)
    assert "feature_unsupported: features softcap" in str(caught.value)


def test_a_named_backend_of_another_protocol_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match=r"protocol_mismatch: protocol 1\.0, accepted: >=2"):
        made(ref("fa3", protocol=">=2"), backend="fa3")


def test_a_name_that_nobody_has_says_what_is_near_or_what_to_install() -> None:
    with pytest.raises(UnknownBackendError, match="did you mean 'torch_native'"):
        made(NATIVE, backend="torch_naive")
    with pytest.raises(UnknownBackendError, match="next: pip install attn-fa3"):
        made(NATIVE, backend="fa3")


def test_a_broken_or_ambiguous_name_is_refused() -> None:
    with pytest.raises(PluginError, match="there is no manifest"):
        made(broken("fa3"), NATIVE, backend="fa3")
    pair = [ref("fa3", dist=dist, ambiguous=True) for dist in ("attn-a", "attn-b")]
    with pytest.raises(AmbiguousBackendError, match="fa3@attn-a, fa3@attn-b"):
        made(*pair, NATIVE, backend="fa3")
    assert chosen(made(*pair, NATIVE, backend="fa3@attn-b"))["decode"] == "fa3@attn-b"


def test_auto_does_not_guess_between_two_of_one_name() -> None:
    found = made(*(ref("fa3", dist=dist, ambiguous=True) for dist in ("attn-a", "attn-b")), NATIVE)
    assert chosen(found)["decode"] == "torch_native"
    assert statuses(found)["fa3@attn-a"] == "refused"
    assert "ambiguous: several distributions have fa3" in rows(found)["fa3@attn-b"]


def test_nothing_that_fits_lists_every_candidate_with_its_reasons() -> None:
    with pytest.raises(NoBackendError) as caught:
        made(ref("fa3"), broken("wave"), wanted=config(dtype="float32"))
    text = str(caught.value)
    assert "no backend can run prefill" in text
    assert "fa3: refused: dtype_unsupported: dtype float32" in text
    assert "wave: problem: broken_plugin: there is no manifest" in text
    assert "flashinfer: not_installed: not_installed: no installed distribution has flashinfer" in text


def test_the_trace_holds_every_candidate_once_in_every_phase() -> None:
    lonely = ref("lonely", clause(phases=["decode"]), fallback={"prefill": ["absent", "fa3"]})
    rocm, off = ref("wave", clause(device="rocm")), broken("off", code="disabled")
    found = made(NATIVE, ref("fa3"), rocm, broken("bad"), off, lonely)
    expected = sorted(["torch_native", "fa3", "wave", "bad", "off", "lonely", "flashinfer", "triton", "fa4"])
    assert sorted(c.listed for c in found.trace["decode"]) == expected
    assert sorted(c.listed for c in found.trace["prefill"]) == sorted([*expected, "absent"])
    assert statuses(found) == {
        "fa3": "chosen", "lonely": "accepted", "torch_native": "accepted", "wave": "refused", "bad": "problem",
        "off": "problem", "fa4": "not_installed", "flashinfer": "not_installed", "triton": "not_installed",
    }  # fmt: skip
    assert rows(found)["off"].startswith("off: problem: disabled")
    assert "pip install attn-flashinfer" in rows(found)["flashinfer"]


def test_every_phase_the_config_needs_is_planned_and_no_other() -> None:
    spec = clause(phases=list(PHASES), features=["verify_chain"])
    assert tuple(made(ref("fa3", spec)).phases) == ("prefill", "decode")
    speculating = config(speculative_num_draft_tokens=4)
    assert tuple(made(ref("fa3", spec), wanted=speculating).phases) == PHASES
    assert tuple(made(ref("fa3", spec), wanted=speculating, phases=["verify"]).phases) == ("verify",)


def test_an_encoder_alone_has_a_prefill_and_nothing_else() -> None:
    only = ref("fa3", clause(page_sizes=None, kv_layouts=None, features=["ragged"], head_dims="any"))
    assert tuple(made(only, wanted=config(TOWER)).phases) == ("prefill",)


@pytest.mark.parametrize(
    ("prefill", "decode", "page_size", "layout"),
    [
        ({"page_sizes": "any"}, {"page_sizes": "any"}, 16, "NHD"),
        ({"page_sizes": [1, 64]}, {"page_sizes": [64, 128]}, 64, "NHD"),
        (
            {"page_sizes": [16, 64], "kv_layouts": ["NHD", "HND"]},
            {"page_sizes": [16], "kv_layouts": ["HND"]},
            16,
            "HND",
        ),
        ({"page_sizes": [24, 48]}, {"page_sizes": [24]}, 24, "NHD"),
        ({"page_sizes": {"multiple_of": 7}}, {"page_sizes": {"multiple_of": 5}}, 35, "NHD"),
        (
            {"page_sizes": [1, 16], "kv_layouts": ["HND", "NHD"]},
            {"page_sizes": "any", "kv_layouts": ["HND", "NHD"]},
            16,
            "NHD",
        ),
    ],
)
def test_a_free_page_size_and_layout_are_chosen_native_for_all(
    prefill: dict[str, Any], decode: dict[str, Any], page_size: int, layout: str
) -> None:
    found = made(ref("a", clause(phases=["prefill"], **prefill)), ref("b", clause(phases=["decode"], **decode)))
    assert (found.config.page_size, found.config.kv_layout) == (page_size, layout)
    assert not any(planned.converted for planned in found.phases.values())


def test_with_nothing_native_in_common_one_phase_is_converted() -> None:
    found = made(
        ref("a", mla_clause(phases=["prefill"], page_sizes=[1])),
        ref("b", mla_clause(phases=["decode"])),
        wanted=config(MLA),
    )
    assert (found.config.page_size, found.config.kv_layout) == (64, "MLA")
    assert [(p.native_page_size, p.converted) for p in found.phases.values()] == [(1, True), (64, False)]
    assert "pages of 64 read as 1" in found.explain()


def test_with_only_odd_sizes_both_are_converted_from_a_common_multiple() -> None:
    found = made(
        ref("a", clause(phases=["prefill"], page_sizes=[9])), ref("b", clause(phases=["decode"], page_sizes=[6]))
    )
    assert found.config.page_size == 18
    assert [p.native_page_size for p in found.phases.values()] == [9, 6]


def test_a_page_size_the_user_gave_is_never_changed() -> None:
    every = [ref("fa3", clause(page_sizes=[16])), ref("flashinfer", clause(page_sizes=[1, 8]))]
    found = made(*every, wanted=config(page_size=8))
    assert (chosen(found)["decode"], found.config.page_size) == ("flashinfer", 8)
    assert "page_size_unsupported: page_size 8, accepted: 16" in rows(found)["fa3"]


def test_a_layout_the_user_gave_is_never_changed() -> None:
    found = made(ref("fa3"), ref("flashinfer", clause(kv_layouts=["HND"])), wanted=config(kv_layout="HND"))
    assert (chosen(found)["decode"], found.config.kv_layout) == ("flashinfer", "HND")


def test_a_pair_without_a_cache_in_common_is_passed_over_for_the_next_best() -> None:
    items = [
        ref("fa3", clause(phases=["decode"], kv_layouts=["HND"])),
        ref("flashinfer", clause(phases=["prefill", "decode"])),
    ]
    found = made(*items)
    assert chosen(found) == {"prefill": "flashinfer", "decode": "flashinfer"}
    assert "no_common_cache" in rows(found)["fa3"]
    assert "HND pages of 16, 32" in rows(found)["fa3"]


def test_equal_ranks_prefer_one_backend_for_all_phases() -> None:
    items = [ref("fa3", clause(page_sizes=[16])), ref("flashinfer", clause(page_sizes=[64], kv_layouts=["HND"]))]
    assert chosen(made(*items)) == {"prefill": "fa3", "decode": "fa3"}


def test_of_two_choices_of_one_rank_the_one_with_fewer_backends_is_taken() -> None:
    def fixed(name: str, prefill: int, decode: int) -> BackendRef:
        sizes = {"prefill": prefill, "decode": decode}
        return ref(name, *(clause(phases=[p], page_sizes=[n], kv_layouts=["HND"]) for p, n in sizes.items()))

    # fa3 and triton fit each other one way round, flashinfer fits itself: 0 + 2 is 1 + 1
    found = made(fixed("fa3", 16, 64), fixed("flashinfer", 32, 32), fixed("triton", 64, 16))
    assert chosen(found) == {"prefill": "flashinfer", "decode": "flashinfer"}


def test_no_pair_with_a_cache_in_common_is_no_plan_and_shows_both_sides() -> None:
    with pytest.raises(NoCommonCacheError) as caught:
        made(
            ref("a", clause(phases=["prefill"])),
            ref("b", clause(phases=["decode"], kv_layouts=["HND"], page_sizes=[64])),
        )
    assert "prefill: a has NHD pages of 16, 32" in str(caught.value)
    assert "decode: b has HND pages of 64" in str(caught.value)


def test_named_backends_without_a_cache_in_common_are_no_plan() -> None:
    items = [NATIVE, ref("a", clause()), ref("b", clause(kv_layouts=["HND"]))]
    with pytest.raises(NoCommonCacheError):
        made(*items, backend="prefill=a,decode=b")


def test_the_config_of_a_plan_is_complete_and_its_decisions_are_for_it() -> None:
    found = made(ref("fa3", clause(page_sizes=[16]), clause(page_sizes=[16], features=["sliding_window"])),
                 wanted=config(MHA, replace(MHA, sliding_window=4)))  # fmt: skip
    decision = found.phases["prefill"].decision
    assert (decision.page_size, decision.native_page_size, decision.clauses) == (16, 16, (0, 1))
    assert found.phases["prefill"].page_size == found.config.page_size == 16


def measured(seconds: dict[str, float]) -> Any:
    return lambda config, phase, system: seconds


def test_measured_time_ranks_before_everything() -> None:
    items = [NATIVE, ref("fa3"), ref("flashinfer"), ref("zebra")]
    found = made(*items, rankings=measured({"zebra": 2e-5, "torch_native": 1e-5}))
    assert list(statuses(found))[:4] == ["torch_native", "zebra", "fa3", "flashinfer"]
    assert found.phases["decode"].why == "measured: 10.0 us"


def test_what_tune_filed_for_this_machine_is_used_by_itself() -> None:
    wanted, items = config(), [ref("fa3"), ref("flashinfer")]
    timings = [Timing(shape_key(wanted, MHA, phase), "flashinfer", "1.0", 1e-5) for phase in ("prefill", "decode")]
    save_timings(tuned_path(HOPPER), timings, device="test", date="2026-11-22")
    assert chosen(made(*items, wanted=wanted)) == {"prefill": "flashinfer", "decode": "flashinfer"}
    assert chosen(made(*items, wanted=wanted, system=BLACKWELL))["decode"] == "flashinfer"
    assert chosen(made(*items, wanted=replace(wanted, dtype="float16")))["decode"] == "fa3"
    assert chosen(made(*items, wanted=wanted, rankings=measured({})))["decode"] == "fa3"


def test_what_a_build_refused_is_left_out_when_planned_again() -> None:
    refusal = {("fa3", "decode"): (reason("build_unsupported", "features", "softcap", "compiled without"),)}
    found = made(ref("fa3"), ref("flashinfer"), build_refusals=refusal)
    assert chosen(found) == {"prefill": "fa3", "decode": "flashinfer"}
    assert "build_unsupported" in rows(found)["fa3"]
    with pytest.raises(BackendRefusedError, match="build_unsupported"):
        made(ref("fa3"), ref("flashinfer"), backend="fa3", build_refusals=refusal)


def test_planning_twice_gives_the_same_plan() -> None:
    items = [NATIVE, ref("fa3"), ref("flashinfer")]
    assert made(*items) == made(*items)
    assert made(*items).explain() == made(*items).explain()


@pytest.mark.parametrize("policy", ["silent", "", None])
def test_an_unknown_fallback_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ConfigError, match="accepted: warn, error, allow"):
        made(NATIVE, fallback=policy)


def test_notes_of_the_machine_and_of_discovery_reach_the_plan() -> None:
    system = replace(HOPPER, note="something is odd here")
    found = plan(config(), system=system, installed=replace(installed(NATIVE), notes=("a slip",)))
    assert found.notes == ("something is odd here", "a slip")
    assert "note: something is odd here" in found.explain()


def test_backends_of_a_plan_are_listed_once() -> None:
    assert [ref.listed for ref in made(ref("fa3")).backends] == ["fa3"]


def test_every_error_of_planning_carries_its_exit_code() -> None:
    codes = {error: error.exit_code for error in (UsageError, NoBackendError, PluginError, ProtocolError)}
    assert codes == {UsageError: 2, NoBackendError: 3, PluginError: 4, ProtocolError: 5}
    assert all(issubclass(error, AttnError) for error in codes)
