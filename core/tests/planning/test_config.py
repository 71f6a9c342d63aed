"""A config that contradicts itself or the contract is refused when it is made; phases and features follow from it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from attn_core.errors import ConfigError
from attn_core.planning.config import PHASES, AttentionConfig, LayerKind, check_page_size

from .building import MHA, MLA, TOWER, config


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_q_heads": 0}, "num_q_heads is 0"),
        ({"num_kv_heads": True}, "num_kv_heads is True"),
        ({"qk_head_dim": 64.0}, "qk_head_dim is 64.0"),
        ({"num_q_heads": 9, "num_kv_heads": 2}, "not a multiple"),
        ({"kind": "gqa"}, "accepted: mha, mla"),
        ({"kind": "mla"}, "one latent KV head"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
    ],
)
def test_an_impossible_layer_kind_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        replace(MHA, **changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layers": ()}, "without layers"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'?"),
        ({"kv_cache_dtype": "fp8"}, "accepted: auto, fp8_e4m3, fp8_e5m2"),
        ({"kv_cache_dtype": "fp8"}, r"did you mean 'fp8_e4m3'\?"),  # as other engines have it
        ({"kv_layout": "NDH"}, "accepted: NHD, HND, MLA"),
        ({"page_size": 0}, "page size 0"),
        ({"page_size": 3_000_000_000}, "page size 3000000000"),
        ({"page_size": 16.0}, r"page size 16\.0"),
        ({"page_size": True}, "page size True"),
        ({"max_context_len": 0}, "max_context_len is 0"),
        ({"speculative_num_draft_tokens": -1}, "speculative_num_draft_tokens is -1"),
        ({"speculative_eagle_topk": 0}, "speculative_eagle_topk is 0"),
        ({"speculative_eagle_topk": 2}, "no draft tokens to make a tree of"),
        ({"layers": (replace(MHA, causal=False),)}, "a cached layer that is not causal"),
        ({"layers": (replace(MLA, scale=None),)}, "an MLA layer without a scale"),
        (
            {"layers": (replace(MHA, layer_ids=(0, 1)), replace(MHA, sinks=True, layer_ids=(1,)))},
            r"layer ids \[1\] are named by two",
        ),
    ],
)
def test_an_impossible_config_is_refused_with_what_is_accepted(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        AttentionConfig(**{"layers": (MHA,), **changes})
    assert caught.value.accepted


@pytest.mark.parametrize("size", [1, 16, 65536])
def test_a_page_size_is_an_integer_within_bounds(size: int) -> None:
    assert check_page_size(size) == size


def test_phases_follow_from_speculation() -> None:
    assert config().phases == ("prefill", "decode")
    assert config(speculative_num_draft_tokens=1).phases == PHASES


def test_ragged_layers_run_in_prefill_only_and_have_no_cache() -> None:
    both = config(MHA, TOWER)
    assert both.kinds("prefill") == (MHA, TOWER)
    assert both.kinds("decode") == both.cached_kinds == (MHA,)
    assert both.without_towers() == config(MHA)
    with pytest.raises(ConfigError, match="without layers"):
        config(TOWER).without_towers()


CROSS = replace(MHA, cross=True)
NOT_VERIFY = ("prefill", "decode", "draft")


@pytest.mark.parametrize(
    ("kind", "serving", "features"),
    [
        (MHA, {}, {phase: set() for phase in NOT_VERIFY}),
        (replace(MHA, sliding_window=1), {}, {phase: {"sliding_window"} for phase in NOT_VERIFY}),
        (replace(MHA, softcap=1.0, sinks=True), {}, {phase: {"softcap", "sinks"} for phase in NOT_VERIFY}),
        (
            CROSS,
            {"bidirectional_spans": True, "speculative_num_draft_tokens": 4},
            {phase: {"cross"} for phase in PHASES},
        ),
        (TOWER, {"bidirectional_spans": True}, {"prefill": {"ragged"}}),
        (MHA, {"bidirectional_spans": True}, {"prefill": {"bidirectional_spans"}, "decode": set()}),
        (MHA, {"cuda_graph": True}, {"prefill": set(), "decode": {"cuda_graph"}, "draft": {"cuda_graph"}}),
        (MHA, {"speculative_num_draft_tokens": 4}, {"decode": set(), "verify": {"verify_chain"}, "draft": set()}),
        (MHA, {"speculative_num_draft_tokens": 4, "speculative_eagle_topk": 2}, {"verify": {"verify_tree"}}),
        (
            MHA,
            {"lse": True, "deterministic": True, "batch_invariant": True},
            {phase: {"lse", "deterministic", "batch_invariant"} for phase in ("prefill", "decode")},
        ),
    ],
)
def test_features_follow_from_kind_serving_and_phase(
    kind: LayerKind, serving: dict[str, Any], features: dict[Any, set[str]]
) -> None:
    made = config(kind, **serving)
    assert {phase: set(made.features(kind, phase)) for phase in features} == features


def test_a_layer_is_of_the_kind_that_lists_it() -> None:
    full, sliding = replace(MHA, layer_ids=(1,)), replace(MHA, sliding_window=4, layer_ids=(0, 2))
    made = config(full, sliding)
    assert [made.kind_of(i) for i in range(3)] == [sliding, full, sliding]
    assert made.num_layers == 3
    assert config().kind_of(7) == MHA
    with pytest.raises(ConfigError, match="layer 3 is of no layer kind"):
        made.kind_of(3)


def test_the_scale_defaults_to_the_width_of_keys() -> None:
    assert MHA.softmax_scale == 128**-0.5
    assert MLA.softmax_scale == 192**-0.5
    assert (MHA.group_size, MLA.group_size) == (4, 128)


def test_a_config_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(config(MHA, TOWER))) == config(MHA, TOWER)
