"""What is refused, where, and with which reason: the manifest first, then what is installed, then the tensors."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from attn_ascend import backend as backend_module
from attn_ascend.backend import AscendBackend
from attn_ascend.emulator.device import EMULATOR
from attn_ascend.limits import check_cache, refusals, refuse_soc
from attn_ascend.operators import Operators
from attn_core.errors import ConfigError, PluginLoadError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.manifest import Manifest, headline
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.runtime.kv_cache import KVCache

from .steps import kind_of, mla_kind

MANIFEST = Manifest.parse(files("attn_ascend").joinpath("ascend.toml").read_text(), source="ascend.toml")
A2 = EMULATOR.system()
LLAMA = AttentionConfig((kind_of(32, 8, 128),), dtype="float16")
ALL = Operators(fused=2, paged=True, paged_latent=True, write=True, write_latent=True, scatter=True)
BY_ATB = replace(ALL, fused=0)

ACCEPTED = {
    "Llama": LLAMA,
    "SmolLM, a group of 3": AttentionConfig((kind_of(9, 3, 64),), dtype="bfloat16"),
    "pages of 256, read as 128": LLAMA.replace(page_size=256),
    "a window": LLAMA.replace(layers=(kind_of(32, 8, 256, sliding_window=4096),)),
    "sinks and a window": LLAMA.replace(layers=(kind_of(64, 8, 64, sliding_window=128, sinks=True),)),
    "LSE": LLAMA.replace(lse=True),
    "chains of draft tokens": LLAMA.replace(speculative_num_draft_tokens=4),
    "graphs with a window": LLAMA.replace(layers=(kind_of(32, 8, 128, sliding_window=64),), cuda_graph=True),
    "DeepSeek-V3, absorbed": LLAMA.replace(layers=(mla_kind(128),), speculative_num_draft_tokens=2),
    "expanded MLA": LLAMA.replace(layers=(kind_of(128, 128, 192, v_width=128, ragged=True),), lse=True),
    "A3": LLAMA,
}

REFUSED = {
    "softcap": (LLAMA.replace(layers=(kind_of(8, 4, 256, softcap=50.0),)), "feature_unsupported", "softcap"),
    "trees of draft tokens": (
        LLAMA.replace(speculative_num_draft_tokens=8, speculative_eagle_topk=4), "feature_unsupported", "verify_tree"),
    "spans": (LLAMA.replace(bidirectional_spans=True), "feature_unsupported", "bidirectional_spans"),
    "cross attention": (LLAMA.replace(layers=(kind_of(8, 8, 128, cross=True),)), "feature_unsupported", "cross"),
    "deterministic": (LLAMA.replace(deterministic=True), "feature_unsupported", "deterministic"),
    "float32": (LLAMA.replace(dtype="float32"), "dtype_unsupported", "float32"),
    "an fp8 cache": (LLAMA.replace(kv_cache_dtype="fp8_e4m3"), "kv_dtype_unsupported", "fp8_e4m3"),
    "a group of 71": (LLAMA.replace(layers=(kind_of(71, 1, 64),)), "group_size_unsupported", "71"),
    "heads of 72": (LLAMA.replace(layers=(kind_of(8, 8, 72),)), "head_dim_unsupported", "72/72"),
    "heads of 528": (LLAMA.replace(layers=(kind_of(8, 8, 528),)), "head_dim_unsupported", "528/528"),
    "192/128 in pages": (LLAMA.replace(layers=(kind_of(8, 8, 192, v_width=128),)), "head_dim_unsupported", "192/128"),
    "another latent": (
        LLAMA.replace(layers=(LayerKind(8, 1, 288, 256, kind="mla", scale=0.1),)), "head_dim_unsupported", "288/256"),
    "a window in MLA": (
        LLAMA.replace(layers=(LayerKind(8, 1, 576, 512, kind="mla", scale=0.1, sliding_window=8),)),
        "feature_unsupported", "sliding_window"),
    "graphs of MLA": (LLAMA.replace(layers=(mla_kind(16),), cuda_graph=True), "feature_unsupported", "cuda_graph"),
    "graphs with an LSE": (LLAMA.replace(lse=True, cuda_graph=True), "feature_unsupported", "lse|cuda_graph"),
    "graphs with sinks": (
        LLAMA.replace(layers=(kind_of(8, 1, 64, sinks=True),), cuda_graph=True),
        "feature_unsupported", "sinks|cuda_graph"),
    "pages of 16": (LLAMA.replace(page_size=16), "page_size_unsupported", "16"),
    "HND": (LLAMA.replace(kv_layout="HND"), "kv_layout_unsupported", "HND"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_manifest_takes(name: str) -> None:
    config = ACCEPTED[name]
    system = replace(A2, arch="ascend910_9382") if name == "A3" else A2
    for phase in config.phases:
        decision = evaluate(MANIFEST, config, phase, system)
        assert decision.accepted, [str(reason) for reason in decision.reasons]


@pytest.mark.parametrize("name", REFUSED)
def test_the_manifest_refuses_with_the_reason(name: str) -> None:
    config, code, wanted = REFUSED[name]
    refused = [evaluate(MANIFEST, config, phase, A2) for phase in config.phases]
    reasons = [reason for decision in refused for reason in decision.reasons]
    assert any(reason.code == code and reason.wanted in wanted.split("|") for reason in reasons), list(
        map(str, reasons)
    )


@pytest.mark.parametrize(
    ("system", "code"),
    [
        (System("cpu"), "device_mismatch"),
        (System("cuda", "sm_90"), "device_mismatch"),
        (System("npu", "ascend310p3"), "arch_mismatch"),
        (System("npu", "ascend950"), "arch_mismatch"),
    ],
    ids=str,
)
def test_other_machines_are_refused(system: System, code: str) -> None:
    decision = evaluate(MANIFEST, LLAMA, "decode", system)
    assert not decision.accepted
    assert code in {reason.code for reason in decision.reasons}


def test_a_card_without_torch_npu_is_told_what_to_install() -> None:
    decision = evaluate(MANIFEST, LLAMA, "decode", replace(A2, dists={"torch": "2.13.0"}))
    (missing,) = decision.reasons
    assert (missing.code, missing.hint) == ("missing_dist", "pip install 'torch-npu>=2.9'")


def test_the_headline_is_what_the_clauses_say() -> None:
    assert headline(MANIFEST) == dict.fromkeys(
        ("page_size_gt_1", "spec_decoding", "mla", "sliding_window", "multimodal"), True
    )


def reasons_of(operators: Operators, config: AttentionConfig, phase: str = "decode") -> list[str]:
    return [f"{r.code} {r.field} {r.wanted}" for r in refusals(operators, config, phase)]  # type: ignore[arg-type]


BUILT = [
    (ALL, LLAMA, []),
    (ALL, LLAMA.replace(layers=(mla_kind(128),)), []),
    (BY_ATB, LLAMA, []),
    (BY_ATB, LLAMA.replace(layers=(mla_kind(128),)), []),
    (replace(ALL, paged_latent=False), LLAMA.replace(layers=(mla_kind(128),)), []),
    (replace(ALL, paged_latent=False, fused=1), LLAMA.replace(layers=(mla_kind(128),)), ["build_unsupported kind mla"]),
    (BY_ATB, LLAMA.replace(lse=True), ["build_unsupported features lse"]),
    (BY_ATB, LLAMA.replace(cuda_graph=True), ["build_unsupported features cuda_graph"]),
    (BY_ATB, LLAMA.replace(layers=(kind_of(8, 8, 256, sliding_window=8),)),
     ["build_unsupported features sliding_window"]),
    (BY_ATB, LLAMA.replace(layers=(kind_of(8, 8, 512),)), ["build_unsupported head_dim 512"]),
    (replace(BY_ATB, paged=False), LLAMA, ["build_unsupported operators attention"]),
    (ALL, LLAMA.replace(max_context_len=262145), ["build_unsupported max_context_len 262145"]),
    (ALL, LLAMA.replace(layers=(kind_of(512, 8, 16),)), ["build_unsupported num_q_heads 512"]),
    (ALL, LLAMA.replace(layers=(kind_of(128, 2, 512),)), ["build_unsupported num_q_heads * head_dim 65536"]),
    (ALL, LLAMA.replace(layers=(kind_of(256, 256, 256),)),
     ["build_unsupported num_q_heads * head_dim 65536", "build_unsupported num_kv_heads * head_dim 65536"]),
]  # fmt: skip


@pytest.mark.parametrize(("operators", "config", "wanted"), BUILT)
def test_what_is_installed_decides_the_rest(operators: Operators, config: AttentionConfig, wanted: list[str]) -> None:
    assert reasons_of(operators, config) == wanted


def test_layers_over_given_keys_are_judged_in_prefill_alone() -> None:
    config = AttentionConfig((kind_of(8, 8, 128), kind_of(8, 8, 80, ragged=True)), dtype="float16")
    assert reasons_of(BY_ATB, config, "prefill") == ["build_unsupported features ragged"]
    assert reasons_of(BY_ATB, config, "decode") == []


@pytest.mark.parametrize(("version", "refused"), [(220, 0), (225, 0), (250, 0), (255, 0), (100, 1), (202, 1), (260, 1)])
def test_chips_without_the_operators_are_refused(version: int, refused: int) -> None:
    assert len(list(refuse_soc(version))) == refused


@pytest.mark.usefixtures("emulated")
def test_build_reasons_are_those_of_the_operators_that_are_here() -> None:
    assert list(AscendBackend.build_reasons(LLAMA, "decode")) == []
    too_long = AscendBackend.build_reasons(LLAMA.replace(max_context_len=1 << 20), "decode")
    assert [reason.field for reason in too_long] == ["max_context_len"]


def test_build_reasons_on_a_machine_without_torch_npu_say_that_it_does_not_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    (reason,) = AscendBackend.build_reasons(LLAMA, "decode")
    assert (reason.code, reason.layer) == ("build_unsupported", "dynamic")
    assert "torch-npu does not load" in reason.have


def test_the_chip_is_asked_where_torch_npu_drives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module.vendor, "load", lambda device: ALL)
    monkeypatch.setattr(backend_module.vendor, "soc_version", lambda: 202)
    (reason,) = AscendBackend.build_reasons(LLAMA, "decode")
    assert (reason.field, reason.wanted) == ("chip", "soc version 202")


def test_a_cache_on_another_device_is_refused() -> None:
    config = LLAMA.replace(page_size=128, kv_layout="NHD")
    with pytest.raises(PluginLoadError, match="runs on an NPU, and the cache is on 'cpu'"):
        AscendBackend(config, KVCache.allocate(config, num_pages=2))


def pool(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


CACHES = {
    "pages of 16": lambda: KVCache({0: pool(2, 16, 2, 64)}, {0: pool(2, 16, 2, 64)}, page_size=16, layout="NHD"),
    "HND": lambda: KVCache({0: pool(2, 2, 128, 64)}, {0: pool(2, 2, 128, 64)}, page_size=128, layout="HND"),
    "float32": lambda: KVCache(
        {0: pool(2, 128, 2, 64, dtype=torch.float32)}, {0: pool(2, 128, 2, 64, dtype=torch.float32)},
        page_size=128, layout="NHD"),
    "more elements than int32 counts": lambda: KVCache(
        {0: torch.empty(1 << 18, 128, 1, 64, dtype=torch.float16)}, {0: pool(1 << 18, 128, 1, 1)},
        page_size=128, layout="NHD"),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_the_operators_do_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a cache of"):
        check_cache(CACHES[name]())
