"""What `flashinfer` and `flashinfer_mla` claim, evaluated without the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import attn_flashinfer
import pytest
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.testing.claimed import missing_codes
from attn_core.testing.generation import generate_cases
from attn_core.testing.refusals import refusal_cases

HOPPER = System.parse("cuda:sm_90")
KIND = LayerKind(8, 2, 128, 128)
MLA = LayerKind(16, 1, 576, 512, kind="mla", scale=192**-0.5)
EXPANDED = LayerKind(16, 16, 192, 128, ragged=True)


def manifest(name: str) -> Manifest:
    return Manifest.parse((Path(attn_flashinfer.__file__).parent / f"{name}.toml").read_text())


@pytest.mark.parametrize("name", ["flashinfer", "flashinfer_mla"])
@pytest.mark.parametrize("system", ["cuda:sm_90", "cuda:sm_80"])
def test_every_case_of_the_kit_is_accepted_or_refused_with_a_code_that_fits(name: str, system: str) -> None:
    here = System.parse(system)
    cases = generate_cases(manifest(name), "contract", here) + refusal_cases(manifest(name), "contract", here)
    for case in cases:
        decisions = [evaluate(manifest(name), case.config(), phase, here) for phase in case.phases]
        codes = {reason.code for decision in decisions for reason in decision.reasons}
        assert codes <= missing_codes(manifest(name), case, here), f"{case.id}: {codes}"
        assert bool(codes) == bool(case.refused), f"{case.id}: {codes}"
    assert sum(bool(case.refused) for case in cases) > 10


@pytest.mark.parametrize(
    ("name", "system", "config", "code"),
    [
        ("flashinfer", "cpu", {}, "device_mismatch"),
        ("flashinfer", "cuda:sm_75", {}, "arch_mismatch"),
        ("flashinfer", "cuda:sm_90", {"layers": (MLA,)}, "kind_unsupported"),
        ("flashinfer", "cuda:sm_90", {"dtype": "float32"}, "dtype_unsupported"),
        ("flashinfer", "cuda:sm_90", {"kv_cache_dtype": "fp8_e5m2"}, "kv_dtype_unsupported"),
        ("flashinfer", "cuda:sm_90", {"batch_invariant": True}, "feature_unsupported"),
        (
            "flashinfer",
            "cuda:sm_90",
            {"layers": (replace(KIND, qk_head_dim=96, v_head_dim=96),)},
            "head_dim_unsupported",
        ),
        ("flashinfer_mla", "cuda:sm_90", {"layers": (KIND,)}, "kind_unsupported"),
        ("flashinfer_mla", "cuda:sm_90", {"layers": (replace(MLA, num_q_heads=256),)}, "group_size_unsupported"),
        ("flashinfer_mla", "cuda:sm_80", {"layers": (MLA,), "kv_cache_dtype": "fp8_e4m3"}, "kv_dtype_unsupported"),
        ("flashinfer_mla", "cuda:sm_90", {"layers": (replace(MLA, softcap=9.0),)}, "feature_unsupported"),
        ("flashinfer_mla", "cuda:sm_90", {"layers": (replace(MLA, sinks=True),)}, "feature_unsupported"),
    ],
)
def test_beyond_the_clauses(name: str, system: str, config: dict[str, Any], code: str) -> None:
    asked = AttentionConfig(**{"layers": (KIND,), **config})
    decision = evaluate(manifest(name), asked, "decode", System.parse(system))
    assert not decision.accepted
    assert code in [reason.code for reason in decision.reasons]


def test_trees_over_the_latent_are_refused() -> None:
    config = AttentionConfig(layers=(MLA,), speculative_num_draft_tokens=4, speculative_eagle_topk=2)
    assert [r.code for r in evaluate(manifest("flashinfer_mla"), config, "verify", HOPPER).reasons] == [
        "feature_unsupported"
    ]
    heads = replace(config, layers=(KIND,))
    assert evaluate(manifest("flashinfer"), heads, "verify", HOPPER).accepted


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify", "draft"])
def test_a_model_with_expanded_prefill_is_taken_whole(phase: Phase) -> None:
    kinds = (replace(MLA, layer_ids=(0,)), replace(EXPANDED, layer_ids=(1,)))
    config = AttentionConfig(layers=kinds, speculative_num_draft_tokens=3)
    assert evaluate(manifest("flashinfer_mla"), config, phase, HOPPER).accepted


@pytest.mark.parametrize(
    ("dists", "code"),
    [
        ({}, "missing_dist"),
        ({"flashinfer-python": "0.6.18.post1"}, "dist_version"),
        ({"flashinfer-python": "0.8.0"}, "dist_version"),
        ({"flashinfer-python": "0.7.2.post1"}, None),
    ],
)
@pytest.mark.parametrize("name", ["flashinfer", "flashinfer_mla"])
def test_versions_of_the_library_are_enforced(name: str, dists: dict[str, str], code: str | None) -> None:
    kind = MLA if name == "flashinfer_mla" else KIND
    system = System("cuda", "sm_90", dists=dists)
    reasons = evaluate(manifest(name), AttentionConfig(layers=(kind,)), "decode", system).reasons
    assert [reason.code for reason in reasons] == ([code] if code else [])


def test_both_say_that_they_plan_from_host_lengths() -> None:
    assert all(manifest(name).needs_host_lengths for name in ("flashinfer", "flashinfer_mla"))
