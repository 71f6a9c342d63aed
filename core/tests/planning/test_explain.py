"""What a person and a tool read of a plan: every phase, every candidate, every reason, and nothing that is not so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from attn_core.planning.config import LayerKind
from attn_core.planning.explain import describe_kind
from attn_core.planning.plan import Plan, plan
from attn_core.planning.system import System

from .building import HOPPER, MHA, MLA, TOWER, broken, clause, config, installed, mla_clause, ref

SM100 = System.parse("cuda:sm_100")
TRTLLM = ref(
    "trtllm_mla",
    mla_clause(phases=["decode"], arch=">=sm_100", page_sizes=[32, 64]),
    dist="attn-mla",
    requires={"dists": ["flashinfer-python>=0.6"]},
    fallback={"prefill": ["flashinfer_mla", "triton"]},
)
FLASHINFER = ref("flashinfer_mla", mla_clause(page_sizes=[1, 32, 64]), dist="attn-flashinfer")
FA3 = ref("fa3", clause(arch=">=sm_90,<sm_100"))


def deepseek() -> Plan:
    wanted = config(replace(MLA, layer_ids=tuple(range(61))), model="deepseek-v3")
    return plan(wanted, system=SM100, installed=installed(TRTLLM, FLASHINFER, FA3, broken("bad", "its module is gone")))


TEXT = """\
deepseek-v3 on cuda:sm_100 (not this machine: libraries are not judged)
cache   page size 64, layout MLA, bfloat16
layers  0: 61 x mla, 128/1 heads, width 576/512

prefill  flashinfer_mla  attn-flashinfer 1.0  native pages  preferred for cuda >=sm_100,<sm_120 mla
decode   trtllm_mla      attn-mla 1.0         native pages  preferred for cuda >=sm_100,<sm_120 mla

prefill: 5 candidates
  flashinfer_mla  chosen         preferred for cuda >=sm_100,<sm_120 mla
  fa3             refused        arch_mismatch: arch sm_100, accepted: >=sm_90,<sm_100
                                 kind_unsupported: kind mla, accepted: mha
  trtllm_mla      refused        phase_unsupported: phase prefill, accepted: decode
  bad             problem        broken_plugin: its module is gone
  triton          not installed  not_installed: no installed distribution has triton; pip install attn-triton

decode: 5 candidates
  trtllm_mla      chosen         preferred for cuda >=sm_100,<sm_120 mla
                                 not judged here: missing_dist: flashinfer-python>=0.6 (not installed); \
pip install 'flashinfer-python>=0.6'
  flashinfer_mla  accepted       after trtllm_mla: preferred for cuda >=sm_100,<sm_120 mla
  fa3             refused        arch_mismatch: arch sm_100, accepted: >=sm_90,<sm_100
                                 kind_unsupported: kind mla, accepted: mha
  bad             problem        broken_plugin: its module is gone
  triton          not installed  not_installed: no installed distribution has triton; pip install attn-triton"""


def test_a_plan_for_blackwell_reads_like_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.planning.distributions.scan", dict)
    assert deepseek().explain() == TEXT


def test_a_plan_is_json_data_with_the_whole_trace() -> None:
    data = json.loads(json.dumps(deepseek().to_json()))
    assert (data["schema"], data["version"], data["model"]) == ("attn/plan", 1, "deepseek-v3")
    assert data["system"] == {"device": "cuda", "arch": "sm_100", "forced": True}
    assert (data["page_size"], data["kv_layout"]) == (64, "MLA")
    assert data["phases"]["decode"] == {
        "backend": "trtllm_mla",
        "dist": "attn-mla",
        "version": "1.0",
        "native_page_size": 64,
        "converted": False,
        "why": "preferred for cuda >=sm_100,<sm_120 mla",
        "fallback": [],
        "clauses": [0],
    }
    rows = {row["backend"]: row for row in data["trace"]["prefill"]}
    assert set(rows) == {"flashinfer_mla", "trtllm_mla", "fa3", "bad", "triton"}
    assert rows["trtllm_mla"]["reasons"][0]["code"] == "phase_unsupported"
    assert rows["flashinfer_mla"]["decision"]["native_page_size"] is None  # judged before the page size was chosen
    assert rows["triton"]["status"] == "not_installed"


def test_what_stands_against_several_layer_kinds_is_one_line() -> None:
    kinds = [replace(MHA, softcap=cap) for cap in (0.0, 1.0, 2.0)]
    both = installed(ref("fa3"), ref("flashinfer", clause(features=["softcap"])))
    text = plan(config(*kinds), system=HOPPER, installed=both).explain()
    assert "feature_unsupported: features softcap (layer kinds 1, 2), accepted: none" in text


def test_a_conversion_and_the_dtype_of_the_cache_are_said() -> None:
    small = ref("fa3", clause(page_sizes=[16], kv_dtypes=["fp8_e4m3"]))
    wanted = config(kv_cache_dtype="fp8_e4m3", page_size=64)
    text = plan(wanted, system=HOPPER, installed=installed(small)).explain()
    assert "pages of 64 read as 16" in text
    assert "page size 64, layout NHD, fp8_e4m3 (computed in bfloat16)" in text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (MHA, "mha, 32/8 heads, width 128"),
        (
            replace(MHA, sliding_window=4, softcap=50.0, layer_ids=(0, 2)),
            "2 x mha, 32/8 heads, width 128, window 4, softcap 50",
        ),
        (replace(MHA, sinks=True), "mha, 32/8 heads, width 128, sinks"),
        (replace(MHA, cross=True, causal=False), "mha, 32/8 heads, width 128, cross, not causal"),
        (TOWER, "mha, 16/16 heads, width 72, ragged, not causal"),
        (MLA, "mla, 128/1 heads, width 576/512"),
    ],
)
def test_a_layer_kind_is_one_line(kind: LayerKind, text: str) -> None:
    assert describe_kind(kind) == text
