"""`attn explain` and `attn info`: plans for machines that are not here, every candidate once, and typed refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import BACKEND, MANIFEST, Site

DECODE_ONLY = MANIFEST.replace('["prefill", "decode"]', '["decode"]').replace(
    "[[supports]]", '[fallback]\nprefill = ["not_here", "good"]\n[[supports]]'
)


def test_the_plan_and_every_candidate_once(site: Site) -> None:
    site.plugin("good")
    site.plugin("elsewhere", manifest=MANIFEST.replace('"any"\nkind', '"npu"\nkind'))
    site.plugin("broken", manifest="schema = = 1")
    done = site.attn("explain", "llama-3.1-8b", "--json", "--attention-backend", "good")
    assert done.code == 0
    document = done.json
    assert (document["schema"], document["version"]) == ("attn/plan", 1)
    assert {phase: entry["backend"] for phase, entry in document["phases"].items()} == {
        "prefill": "good",
        "decode": "good",
    }
    for candidates in document["trace"].values():
        names = [each["backend"] for each in candidates]
        assert len(names) == len(set(names))
        assert {"good", "elsewhere", "broken", "torch_native"} <= set(names)


def test_hardware_that_is_not_here(site: Site) -> None:
    chip = MANIFEST.replace('device = "any"', 'device = "cuda"\narch = ">=sm_100"')
    site.plugin("blackwell", manifest=chip)
    assert site.attn("explain", "llama-3.1-8b", "--attention-backend", "blackwell").code == 3
    there = site.attn("explain", "llama-3.1-8b", "--system", "cuda:sm_100", "--attention-backend", "blackwell")
    assert there.code == 0
    assert "llama-3.1-8b on cuda:sm_100 (not this machine" in there.out
    older = site.attn("explain", "llama-3.1-8b", "--system", "cuda:sm_90", "--attention-backend", "blackwell")
    assert older.code == 3
    assert "arch_mismatch" in older.err
    forced = site.attn("explain", "llama-3.1-8b", "--attention-backend", "blackwell", ATTN_FORCE_SYSTEM="cuda:sm_100")
    assert forced.out == there.out


def test_a_backend_for_each_phase(site: Site) -> None:
    site.plugin("good")
    split = site.attn(
        "explain",
        "llama-3.1-8b",
        "--decode-attention-backend",
        "good",
        "--prefill-attention-backend",
        "torch_native",
        "--json",
    )
    assert {p: e["backend"] for p, e in split.json["phases"].items()} == {"prefill": "torch_native", "decode": "good"}
    text = site.attn("explain", "llama-3.1-8b", "--attention-backend", "prefill=torch_native,decode=good", "--json")
    assert text.json["phases"] == split.json["phases"]


def test_what_a_backend_lacks_by_design_falls_back_and_says_so_once(site: Site) -> None:
    site.plugin("good")
    site.plugin("decoder", manifest=DECODE_ONLY)
    arguments = ("explain", "llama-3.1-8b", "--attention-backend", "decoder", "--json")
    done = site.attn(*arguments)
    assert done.code == 0
    assert done.json["phases"]["prefill"]["fallback"][0] == "decoder"
    assert done.json["phases"]["prefill"]["backend"] == "good"
    assert done.err.startswith("attn: prefill runs on good")
    assert len(done.err.splitlines()) == 1
    assert site.attn(*arguments, "--fallback", "allow").err == ""
    refused = site.attn(*arguments, "--fallback", "error")
    assert refused.code == 3
    assert "backend_refused" in refused.err


def test_speculation_plans_its_phases_too(site: Site) -> None:
    arguments = ("explain", "llama-3.1-8b", "--json", "--speculative-num-draft-tokens", "4")
    assert list(site.attn(*arguments).json["phases"]) == ["prefill", "decode", "verify", "draft"]
    site.plugin("good")
    refused = site.attn(*arguments, "--speculative-eagle-topk", "2", "--attention-backend", "verify=good")
    assert refused.code == 3


def test_an_engine_that_runs_the_towers_plans_without_them(site: Site) -> None:
    site.plugin("good", manifest=MANIFEST.replace('"sliding_window"', '"sliding_window", "bidirectional_spans"'))
    arguments = ("explain", "gemma-3-27b", "--json", "--attention-backend", "good")
    refused = site.attn(*arguments)
    assert refused.code == 3
    assert "ragged (layer kind 2)" in refused.err
    alone = site.attn(*arguments, "--without-towers")
    assert alone.code == 0
    assert len(alone.json["layers"]) == 2


def test_a_model_folder_and_a_config_file(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256,
             "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))
    for source in (folder, folder / "config.json"):
        done = site.attn("explain", str(source), "--json")
        assert done.json["model"] == "my-model"
        assert done.json["layers"] == ["2 x mha, 8/2 heads, width 32"]


L = ("llama-3.1-8b",)

BAD = {
    "unknown model": (["lama-3.1-8b"], 2, "unknown_model", "llama-3.1-8b"),
    "page size 0": ([*L, "--page-size", "0"], 2, "bad_config", "from 1 to 65536"),
    "page size -1": ([*L, "--page-size", "-1"], 2, "bad_config", "from 1 to 65536"),
    "page size 3 billion": ([*L, "--page-size", "3000000000"], 2, "bad_config", "from 1 to 65536"),
    "page size of letters": ([*L, "--page-size", "many"], 2, "many", "integer"),
    "unknown dtype": ([*L, "--dtype", "bfloat61"], 2, "bad_config", "bfloat16"),
    "unknown cache dtype": ([*L, "--kv-cache-dtype", "fp8"], 2, "bad_config", "fp8_e4m3"),
    "unknown layout": ([*L, "--kv-layout", "NDH"], 2, "bad_config", "NHD"),
    "unknown system": ([*L, "--system", "cude:sm_90"], 2, "usage", "cuda:sm_90"),
    "system without a chip": ([*L, "--system", "cuda"], 2, "usage", "cuda:sm_90"),
    "unknown backend": ([*L, "--attention-backend", "torch_nativ"], 2, "unknown_backend", "'torch_native'"),
    "unknown phase": ([*L, "--attention-backend", "prefil=torch_native"], 2, "usage", "'prefill'"),
    "broken backend": ([*L, "--attention-backend", "broken"], 4, "broken_plugin", "is not TOML"),
    "another protocol": ([*L, "--attention-backend", "future"], 5, "protocol_mismatch", ">=9"),
    "refused backend": ([*L, "--attention-backend", "small"], 3, "backend_refused", "head_dim_unsupported"),
    "fallback cycle": ([*L, "--attention-backend", "circle_a"], 4, "fallback_cycle", "circle_b"),
    "no cache in common": ([*L, "--attention-backend", "prefill=hnd,decode=good"], 3, "no_common_cache", "HND"),
    "folder without a model": (["."], 2, "bad_model_folder", "config.json"),
    "negative draft tokens": ([*L, "--speculative-num-draft-tokens", "-2"], 2, "bad_config", "0 (off)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with every plugin that the table of bad input names."""
    site = Site(tmp_path_factory.mktemp("crowded"))
    circle = MANIFEST.replace('["prefill", "decode"]', '["decode"]')
    site.plugin("good", code=BACKEND)
    site.plugin("broken", manifest="schema = = 1")
    site.plugin("future", manifest=MANIFEST.replace(">=1.0,<2", ">=9"))
    site.plugin("small", manifest=MANIFEST.replace('"any"\npage', "[[32, 32]]\npage"))
    site.plugin("hnd", manifest=MANIFEST.replace("NHD", "HND"))
    site.plugin("circle_a", manifest=circle.replace("[[supports]]", '[fallback]\nprefill = ["circle_b"]\n[[supports]]'))
    site.plugin("circle_b", manifest=circle.replace("[[supports]]", '[fallback]\nprefill = ["circle_a"]\n[[supports]]'))
    return site


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error_with_the_next_step(case: str, crowded: Site) -> None:
    arguments, code, what, accepted = BAD[case]
    done = crowded.attn("explain", *arguments)
    assert done.code == code
    assert done.out == ""
    assert what in done.err
    assert accepted in done.err
    assert "Traceback" not in done.err


def test_info_shows_each_clause_and_each_feature(site: Site) -> None:
    site.plugin("decoder", manifest=DECODE_ONLY)
    done = site.attn("info", "decoder")
    assert done.code == 0
    assert "clause 1: decode on any device" in done.out
    assert "attn-decoder 1.2.3" in done.out
    assert "prefill goes to not_here, then good" in done.out
    assert any(line.split()[:2] == ["sliding_window", "claimed"] for line in done.out.splitlines())
    assert any(line.split()[:2] == ["softcap", "refused"] for line in done.out.splitlines())


def test_info_as_json_has_the_clauses(site: Site) -> None:
    site.plugin("good")
    document = site.attn("info", "good", "--json").json
    assert document["clauses"][0]["phases"] == ["prefill", "decode"]
    assert document["features"]["sliding_window"]["state"] == "claimed"


@pytest.mark.parametrize(("name", "code", "what"), [("goood", 2, "unknown_backend"), ("broken", 4, "broken_plugin")])
def test_info_of_what_cannot_be_used(crowded: Site, name: str, code: int, what: str) -> None:
    done = crowded.attn("info", name)
    assert done.code == code
    assert what in done.err
