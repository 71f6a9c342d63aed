"""What `flashmla` and `trtllm_mla` claim, and where their missing phases go, without the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attn_mla
import pytest
from attn_core.errors import BackendRefusedError, NoBackendError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.discovery import BackendRef, Installed
from attn_core.planning.manifest import Manifest
from attn_core.planning.plan import FallbackWarning, plan
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.testing.claimed import missing_codes
from attn_core.testing.generation import generate_cases
from attn_core.testing.refusals import refusal_cases

MLA = LayerKind(16, 1, 576, 512, kind="mla", scale=192**-0.5)
CHIPS = {"flashmla": "cuda:sm_90", "trtllm_mla": "cuda:sm_100"}
PREFILL = Manifest.parse(
    {
        "schema": 1,
        "name": "flashinfer_mla",
        "protocol": ">=1.0,<2",
        "summary": "a stand-in with a prefill",
        "supports": [
            {
                "phases": ["prefill", "decode", "draft"], "device": "cuda", "kind": "mla", "dtypes": ["bfloat16"],
                "head_dims": [[576, 512]], "page_sizes": "any",
            }
        ],
    }
)  # fmt: skip


def manifest(name: str) -> Manifest:
    return Manifest.parse((Path(attn_mla.__file__).parent / f"{name}.toml").read_text())


def installed(*manifests: Manifest) -> Installed:
    return Installed(
        backends=tuple(BackendRef(m.name, f"attn-{m.name}", "0.1.0", f"{m.name}:B", m, m.name) for m in manifests)
    )


@pytest.mark.parametrize("name", CHIPS)
def test_every_case_of_the_kit_is_accepted_or_refused_with_a_code_that_fits(name: str) -> None:
    here = System.parse(CHIPS[name])
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
        ("flashmla", "cuda:sm_100", {}, "arch_mismatch"),
        ("flashmla", "cuda:sm_90", {"dtype": "float32"}, "dtype_unsupported"),
        ("flashmla", "cuda:sm_90", {"page_size": 16}, "page_size_unsupported"),
        ("flashmla", "cuda:sm_90", {"kv_cache_dtype": "fp8_e5m2"}, "kv_dtype_unsupported"),
        ("flashmla", "cuda:sm_90", {"kv_cache_dtype": "fp8_e4m3", "dtype": "float16"}, "kv_dtype_unsupported"),
        ("flashmla", "cuda:sm_90", {"deterministic": True, "batch_invariant": True}, "feature_unsupported"),
        ("trtllm_mla", "cuda:sm_90", {}, "arch_mismatch"),
        ("trtllm_mla", "cuda:sm_100", {"dtype": "float16"}, "dtype_unsupported"),
        ("trtllm_mla", "cuda:sm_100", {"kv_cache_dtype": "fp8_e5m2"}, "kv_dtype_unsupported"),
        ("trtllm_mla", "cuda:sm_100", {"page_size": 16}, "page_size_unsupported"),
        ("trtllm_mla", "cpu", {}, "device_mismatch"),
    ],
)
def test_beyond_the_clauses(name: str, system: str, config: dict[str, Any], code: str) -> None:
    asked = AttentionConfig(layers=(MLA,), **config)
    assert code in [r.code for r in evaluate(manifest(name), asked, "decode", System.parse(system)).reasons]


@pytest.mark.parametrize("page", [64, 128, 192])
def test_larger_pages_are_read_as_pages_of_64(page: int) -> None:
    decision = evaluate(
        manifest("flashmla"), AttentionConfig(layers=(MLA,), page_size=page), "decode", System.parse("cuda:sm_90")
    )
    assert decision.accepted
    assert decision.native_page_size == 64


@pytest.mark.parametrize("name", CHIPS)
def test_prefill_goes_to_the_first_fallback_that_is_here_and_says_so_once(name: str) -> None:
    system = System.parse(CHIPS[name])
    with pytest.warns(FallbackWarning, match="flashinfer_mla") as seen:
        found = plan(AttentionConfig(layers=(MLA,)), name, system=system, installed=installed(manifest(name), PREFILL))
    assert {phase: part.backend.name for phase, part in found.phases.items()} == {
        "prefill": "flashinfer_mla",
        "decode": name,
    }
    assert found.phases["prefill"].fallback == (name, "flashinfer_mla")
    assert len([w for w in seen if issubclass(w.category, FallbackWarning)]) == 1
    assert found.config.page_size in (32, 64)


@pytest.mark.parametrize("name", CHIPS)
def test_without_a_fallback_there_is_no_plan_and_its_reasons_are_told(name: str) -> None:
    with pytest.raises((BackendRefusedError, NoBackendError)) as caught:
        plan(
            AttentionConfig(layers=(MLA,)), name, system=System.parse(CHIPS[name]), installed=installed(manifest(name))
        )
    assert "prefill" in str(caught.value)


def test_trtllm_named_on_hopper_is_refused_with_the_chip() -> None:
    both = installed(manifest("trtllm_mla"), PREFILL)
    with pytest.raises(BackendRefusedError, match="sm_100") as caught:
        plan(AttentionConfig(layers=(MLA,)), "trtllm_mla", system=System.parse("cuda:sm_90"), installed=both)
    assert "arch_mismatch" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dists", "code"),
    [
        ("flashmla", {}, "missing_dist"),
        ("flashmla", {"sgl-flash-mla": "2.0"}, "dist_version"),
        ("flashmla", {"sgl-flash-mla": "1.0.0"}, None),
        ("flashmla", {"flash-mla": "1.0.1"}, None),
        ("trtllm_mla", {"flashinfer-python": "0.6.18"}, "dist_version"),
        ("trtllm_mla", {"flashinfer-python": "0.7.2.post1"}, None),
    ],
)
def test_versions_of_the_libraries_are_enforced(name: str, dists: dict[str, str], code: str | None) -> None:
    system = System("cuda", CHIPS[name].partition(":")[2], dists=dists)
    reasons = evaluate(manifest(name), AttentionConfig(layers=(MLA,)), "decode", system).reasons
    assert [reason.code for reason in reasons] == ([code] if code else [])
