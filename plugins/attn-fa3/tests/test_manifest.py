"""What `fa3` claims, evaluated without the library: each clause takes what it names and refuses what lies beyond."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import attn_fa3
import pytest
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.testing.claimed import missing_codes
from attn_core.testing.generation import generate_cases
from attn_core.testing.refusals import refusal_cases
from attn_fa3.backend import FA3Backend
from fake_flash_attention import FLAGS, FakeFlashAttention

HOPPER = System.parse("cuda:sm_90")
KIND = LayerKind(8, 2, 128, 128)
MLA = LayerKind(16, 1, 576, 512, kind="mla", scale=192**-0.5)


def manifest() -> Manifest:
    return Manifest.parse((Path(attn_fa3.__file__).parent / "fa3.toml").read_text())


def test_every_case_of_the_kit_is_accepted_or_refused_with_a_code_that_fits() -> None:
    cases = generate_cases(manifest(), "contract", HOPPER) + refusal_cases(manifest(), "contract", HOPPER)
    for case in cases:
        decisions = [evaluate(manifest(), case.config(), phase, HOPPER) for phase in case.phases]
        codes = {reason.code for decision in decisions for reason in decision.reasons}
        assert codes <= missing_codes(manifest(), case, HOPPER), f"{case.id}: {codes}"
        assert bool(codes) == bool(case.refused), f"{case.id}: {codes}"
    assert sum(bool(case.refused) for case in cases) > 10


@pytest.mark.parametrize(
    ("system", "config", "code"),
    [
        ("cpu", {}, "device_mismatch"),
        ("cuda:sm_80", {}, "arch_mismatch"),
        ("cuda:sm_100", {}, "arch_mismatch"),
        ("rocm:gfx942", {}, "device_mismatch"),
        ("cuda:sm_90", {"dtype": "float32"}, "dtype_unsupported"),
        ("cuda:sm_90", {"kv_cache_dtype": "fp8_e5m2"}, "kv_dtype_unsupported"),
        ("cuda:sm_90", {"bidirectional_spans": True}, "feature_unsupported"),
        ("cuda:sm_90", {"layers": (replace(KIND, qk_head_dim=264, v_head_dim=264),)}, "head_dim_unsupported"),
        ("cuda:sm_90", {"layers": (replace(KIND, qk_head_dim=100, v_head_dim=100),)}, "head_dim_unsupported"),
        ("cuda:sm_90", {"layers": (replace(MLA, sliding_window=9),)}, "feature_unsupported"),
    ],
)
def test_beyond_the_clauses(system: str, config: dict[str, Any], code: str) -> None:
    asked = AttentionConfig(**{"layers": (KIND,), **config})
    decision = evaluate(manifest(), asked, "prefill", System.parse(system))
    assert not decision.accepted
    assert decision.reasons[0].code == code


@pytest.mark.parametrize(
    ("dists", "code"),
    [
        ({}, "missing_dist"),
        ({"tokenspeed-fa3": "3.0.0.post20260101"}, "dist_version"),
        ({"tokenspeed-fa3": "3.1"}, "dist_version"),
        ({"fa3-fwd": "0.0.3"}, "missing_dist"),
        ({"tokenspeed-fa3": "3.0.0.post20260810"}, None),
        ({"flash-attn-3": "3.0.0"}, None),
    ],
)
def test_versions_of_the_library_are_enforced(dists: dict[str, str], code: str | None) -> None:
    system = System("cuda", "sm_90", dists=dists)
    codes = [reason.code for reason in evaluate(manifest(), AttentionConfig(layers=(KIND,)), "decode", system).reasons]
    assert codes == ([code] if code else [])


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify", "draft"])
def test_all_phases_are_claimed_for_heads_and_for_the_latent(phase: Phase) -> None:
    for kind in (KIND, MLA):
        config = AttentionConfig(layers=(kind,), speculative_num_draft_tokens=4, lse=True)
        assert evaluate(manifest(), config, phase, HOPPER).accepted


#: flag that is compiled out -> a layer kind and config that need it, and the field of the reason
BUILDS: list[tuple[str, LayerKind, dict[str, str], str]] = [
    ("FLASHATTENTION_DISABLE_SOFTCAP", replace(KIND, softcap=30.0), {}, "softcap"),
    ("FLASHATTENTION_DISABLE_LOCAL", replace(KIND, sliding_window=64), {}, "sliding_window"),
    ("FLASHATTENTION_DISABLE_PAGEDKV", KIND, {}, "paged"),
    ("FLASHATTENTION_DISABLE_VARLEN", KIND, {}, "varlen"),
    ("FLASHATTENTION_DISABLE_FP16", KIND, {"dtype": "float16"}, "dtype"),
    ("FLASHATTENTION_DISABLE_FP8", KIND, {"kv_cache_dtype": "fp8_e4m3"}, "kv_dtype"),
    ("FLASHATTENTION_DISABLE_HDIM256", replace(KIND, qk_head_dim=256, v_head_dim=256), {}, "head_dim"),
    ("FLASHATTENTION_DISABLE_HDIM192", replace(KIND, qk_head_dim=192, ragged=True), {}, "head_dim"),
    ("FLASH_ATTENTION_DISABLE_HDIMDIFF64", MLA, {}, "head_dim"),
]


@pytest.mark.parametrize(("flag", "kind", "serving", "field"), BUILDS)
def test_what_a_build_lacks_is_refused_by_its_own_flags(
    fake: FakeFlashAttention, flag: str, kind: LayerKind, serving: dict[str, str], field: str
) -> None:
    config = AttentionConfig(layers=(KIND, kind), **serving)
    assert list(FA3Backend.build_reasons(config, "prefill")) == []
    fake.flags[flag] = True
    found = [reason for reason in FA3Backend.build_reasons(config, "prefill") if reason.kind == 1]
    assert [(reason.code, reason.field) for reason in found] == [("build_unsupported", field)]


def test_the_build_is_only_asked_about_what_runs_in_the_phase(fake: FakeFlashAttention) -> None:
    fake.flags["FLASHATTENTION_DISABLE_SOFTCAP"] = True
    config = AttentionConfig(layers=(KIND, replace(KIND, softcap=30.0, ragged=True)))
    assert [reason.field for reason in FA3Backend.build_reasons(config, "prefill")] == ["softcap"]
    assert list(FA3Backend.build_reasons(config, "decode")) == []


def test_a_build_that_does_not_say_what_is_in_it_is_refused(fake: FakeFlashAttention) -> None:
    fake.flags.clear()
    (found,) = FA3Backend.build_reasons(AttentionConfig(layers=(KIND,)), "decode")
    assert found.field == "flash_attn_config"


def test_the_flags_of_the_table_are_all_there_are() -> None:
    """A flag that is added to the library and matters must be thought about: this list names those that do not."""
    ignored = {
        "BACKWARD",
        "SPLIT",
        "APPENDKV",
        "PACKGQA",
        "CLUSTER",
        "SM8x",
        "HDIM64",
        "HDIM96",
        "HDIM128",
        "VCOLMAJOR",
    }
    named = {flag for flag, *_ in BUILDS} | {"FLASH_ATTENTION_DISABLE_HDIMDIFF192"}
    assert {flag for flag in FLAGS if flag.rpartition("_")[2] not in ignored} == named
