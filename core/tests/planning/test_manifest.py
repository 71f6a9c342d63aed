"""A manifest says what is wrong with it: which key, what is accepted, and what was probably meant."""

from __future__ import annotations

from typing import Any

import pytest
from attn_core.errors import ManifestError
from attn_core.planning.config import FEATURES
from attn_core.planning.manifest import HEADLINE, PROTOCOL_VERSION, Manifest, headline

from .building import clause, manifest, mla_clause

TOML = """
schema   = 1
name     = "flashinfer"
protocol = ">=1.0,<2"
summary  = "paged attention"
[requires]
dists        = ["flashinfer-python>=0.6", "a>=1 | b"]
host_lengths = true
[fallback]
prefill = ["other", "third"]
[[supports]]
phases      = ["decode", "verify"]
device      = "cuda"
arch        = ">=sm_80"
kind        = "mha"
dtypes      = ["float16", "bfloat16"]
kv_dtypes   = ["auto", "fp8_e4m3"]
head_dims   = [[64, 64], { min = 96, max = 256, multiple_of = 32 }, { qk = 192, v = { min = 64, max = 128 } }]
page_sizes  = [1, 8, { multiple_of = 16, max = 256 }]
kv_layouts  = ["NHD", "HND"]
features    = ["sliding_window", "lse"]
max_group_size   = 8
max_draft_tokens = 4
[[supports]]
phases     = ["decode"]
device     = ["cpu", "cuda"]
kind       = "mla"
dtypes     = ["bfloat16"]
head_dims  = "any"
page_sizes = { power_of_two = true }
"""


def test_everything_that_a_manifest_can_say_is_read() -> None:
    parsed = Manifest.parse(TOML, source="here")
    first, second = parsed.clauses
    assert (parsed.name, parsed.summary, parsed.source) == ("flashinfer", "paged attention", "here")
    assert parsed.speaks_protocol
    assert parsed.needs_host_lengths
    assert [str(requirement) for requirement in parsed.requires_dists] == ["flashinfer-python>=0.6", "a>=1 | b"]
    assert parsed.fallback == {"prefill": ("other", "third")}
    assert parsed.phases == {"decode", "verify"}
    assert parsed.features == {"sliding_window", "lse"}
    assert first.devices == ("cuda",)
    assert first.arch.allows("sm_80")
    assert first.kv_dtypes == ("auto", "fp8_e4m3")
    assert first.kv_layouts == ("NHD", "HND")
    assert (first.max_group_size, first.max_draft_tokens) == (8, 4)
    widths = [(64, 64), (96, 96), (192, 64), (192, 128), (256, 256)]
    assert all(first.head_dims.allows(*pair) for pair in widths)
    assert not any(first.head_dims.allows(*pair) for pair in [(100, 100), (192, 130), (288, 288), (64, 96)])
    assert [n for n in range(1, 300) if first.pages.allows(n)] == [1, 8, *range(16, 257, 16)]
    assert second.devices == ("cpu", "cuda")
    assert second.arch.allows(None)
    assert second.kv_dtypes == ("auto",)
    assert second.kv_layouts == ("MLA",)
    assert second.features == frozenset()


def test_text_and_mapping_give_the_same_manifest_and_hash_alike() -> None:
    import tomllib

    a, b = Manifest.parse(TOML, source="one"), Manifest.parse(tomllib.loads(TOML), source="two")
    assert a == b
    assert hash(a) == hash(b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sumary": "x"}, ["sumary", "is not a key", "did you mean 'summary'?"]),
        ({"requires": {"dist": []}}, ["requires.dist", "did you mean 'dists'?"]),
        ({"fallback": {"prefil": ["x"]}}, ["fallback.prefil", "did you mean 'prefill'?"]),
        ({"name": None}, ["name is missing"]),
        ({"summary": None}, ["summary is missing"]),
        ({"protocol": None}, ["protocol is missing"]),
        ({"protocol": "1.0"}, ["protocol", "'>=1.0,<2'"]),
        ({"protocol": ""}, ["protocol is empty"]),
        ({"name": "not a name"}, ["name", "identifier"]),
        ({"name": 7}, ["name is 7"]),
        ({"schema": None}, ["schema is missing"]),
        ({"schema": 2}, ["schema is 2; this core reads schema 1", "pip install --upgrade attn-core"]),
        ({"schema": 0}, ["schema is 0; this core reads schema 1", "write schema = 1"]),
        ({"schema": True}, ["schema is True"]),
        ({"supports": []}, ["supports has no clause"]),
        ({"supports": ["x"]}, ["supports has no clause"]),
        ({"requires": {"dists": ["name[extra]"]}}, ["requires.dists", "name[extra]"]),
        ({"requires": {"dists": [3]}}, ["requires.dists"]),
        ({"requires": {"host_lengths": 1}}, ["requires.host_lengths is 1", "true or false"]),
        ({"requires": "torch"}, ["requires is 'torch'", "a table"]),
        ({"fallback": {"prefill": []}}, ["fallback.prefill"]),
        ({"fallback": {"prefill": ["one"]}}, ["fallback.prefill", "other backends"]),
    ],
)
def test_what_is_wrong_outside_the_clauses(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest("one", **changes)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "one.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"page_size": [16]}, ["supports[0].page_size", "did you mean 'page_sizes'?"]),
        ({"features": ["slidingwindow"]}, ["'slidingwindow'", "did you mean 'sliding_window'?"]),
        ({"phases": ["decod"]}, ["'decod'", "did you mean 'decode'?"]),
        ({"phases": []}, ["phases is empty"]),
        ({"phases": "decode"}, ["phases is 'decode'", "a list"]),
        ({"phases": None}, ["phases is missing"]),
        ({"device": "gpu"}, ["'gpu'", "cpu, cuda, rocm, npu, xpu, any"]),
        ({"device": None}, ["device is missing"]),
        ({"kind": "gqa"}, ["kind is 'gqa'", "mha, mla"]),
        ({"dtypes": ["float8"]}, ["'float8'"]),
        ({"kv_dtypes": ["fp8"]}, ["'fp8'", "did you mean"]),
        ({"kv_layouts": ["NDH"]}, ["'NDH'", "did you mean"]),
        ({"kv_layouts": None}, ["kv_layouts is missing"]),
        ({"kv_layouts": ["MLA"]}, ["kv_layouts", "kind 'mha'", "HND, NHD"]),
        ({"kind": "mla"}, ["kv_layouts", "kind 'mla'", "MLA"]),
        ({"arch": "80"}, ["arch", "'80'"]),
        ({"arch": [">=sm_80", "<sm_90"]}, ["arch", "write both in one text"]),
        ({"head_dims": None}, ["head_dims is missing", "list of [qk, v] pairs"]),
        ({"head_dims": [128]}, ["head_dims has 128"]),
        ({"head_dims": [[128]]}, ["head_dims has [128]"]),
        ({"head_dims": [[128, 0]]}, ["head_dims has [128, 0]"]),
        ({"head_dims": "all"}, ["head_dims is 'all'"]),
        ({"head_dims": [{"minimum": 8}]}, ["'minimum'", "did you mean 'min'?"]),
        ({"head_dims": [{"min": 64, "max": 32}]}, ["min at most max"]),
        ({"head_dims": [{"min": 0}]}, ["min = 0"]),
        ({"page_sizes": None}, ["page_sizes is missing", "ragged"]),
        ({"page_sizes": []}, ["page_sizes is []"]),
        ({"page_sizes": [0]}, ["page_sizes has 0"]),
        ({"page_sizes": [True]}, ["page_sizes has True"]),
        ({"page_sizes": [3_000_000_000]}, ["page_sizes has 3000000000"]),
        ({"page_sizes": "every"}, ["page_sizes is 'every'"]),
        ({"page_sizes": {"multiple": 16}}, ["'multiple'", "did you mean 'multiple_of'?"]),
        ({"page_sizes": {"power_of_two": False}}, ["power_of_two = False", "true"]),
        ({"page_sizes": [{"min": 17, "max": 31, "power_of_two": True}]}, ["allows none"]),
        ({"page_sizes": None, "features": ["ragged"]}, ["kv_layouts is given, but no page_sizes"]),
        ({"max_group_size": 0}, ["max_group_size is 0"]),
        ({"max_draft_tokens": "4"}, ["max_draft_tokens is '4'"]),
    ],
)
def test_what_is_wrong_in_a_clause(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest("one", clause(**changes))
    assert [word for word in words if word not in str(caught.value)] == []
    assert "one.toml: supports[0]." in str(caught.value)


def test_the_second_clause_is_named_as_such() -> None:
    with pytest.raises(ManifestError, match=r"supports\[1\]\.kind"):
        manifest("one", clause(), clause(kind="x"))


def test_text_that_is_no_toml_is_a_manifest_error_with_its_place() -> None:
    with pytest.raises(ManifestError, match=r"here\.toml is not TOML.*line 2"):
        Manifest.parse("schema = 1\nname = one\n", source="here.toml")


@pytest.mark.parametrize(
    ("protocol", "spoken"),
    [
        (">=1.0,<2", True),
        (f"=={PROTOCOL_VERSION}", True),
        (">=2", False),
        ("<1", False),
        (">=1.1", False),
        ("~=1.0", True),
    ],
)
def test_the_protocol_is_a_range_on_the_contract(protocol: str, spoken: bool) -> None:
    assert manifest("one", protocol=protocol).speaks_protocol is spoken


def test_a_clause_with_no_cache_is_for_ragged_layers_only() -> None:
    only = manifest("one", clause(page_sizes=None, kv_layouts=None, features=["ragged"])).clauses[0]
    assert not only.cached
    assert not only.pages


def test_every_feature_of_the_closed_set_can_be_claimed() -> None:
    assert manifest("one", clause(features=list(FEATURES))).features == set(FEATURES)


NOTHING = dict.fromkeys(HEADLINE, False)


@pytest.mark.parametrize(
    ("clauses", "flags"),
    [
        ([clause(page_sizes=[1])], set()),
        ([clause(page_sizes=[1, 16])], {"page_size_gt_1"}),
        ([clause(page_sizes="any")], {"page_size_gt_1"}),
        ([clause(page_sizes=[1], phases=["verify"], features=["verify_chain"])], {"spec_decoding"}),
        ([clause(page_sizes=[1], phases=["decode"], features=["verify_tree"])], set()),
        ([clause(page_sizes=[1], phases=["verify"])], set()),
        ([mla_clause(page_sizes=[1])], {"mla"}),
        ([mla_clause(page_sizes=None, features=["ragged"])], set()),
        ([clause(page_sizes=[1], features=["sliding_window"])], {"sliding_window"}),
        ([clause(page_sizes=[1], features=["bidirectional_spans"])], {"multimodal"}),
        ([clause(page_sizes=[1], features=["cross"])], {"multimodal"}),
        ([clause(page_sizes=[1], features=["bidirectional_spans"], phases=["decode"])], set()),
        ([clause(page_sizes=None, kv_layouts=None, features=["ragged"])], {"multimodal"}),
        ([clause(page_sizes=None, kv_layouts=None, features=["ragged"], head_dims=[[192, 128]])], set()),
    ],
)
def test_the_headline_flags_come_from_the_clauses(clauses: list[dict[str, Any]], flags: set[str]) -> None:
    assert headline(manifest("one", *clauses)) == {**NOTHING, **dict.fromkeys(flags, True)}
