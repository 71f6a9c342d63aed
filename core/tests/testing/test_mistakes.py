"""A wrong answer is named by the mistake that gives it, where it is a known one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core.planning.discovery import register
from attn_core.planning.system import System
from attn_core.testing.cases import Case
from attn_core.testing.liars.registry import liars, manifest
from attn_core.testing.run import Target, run_case

CASES = {
    "window_one_more": ("decode/8x2x64+window=16/1@31/dtype=float32", "a window of one key more"),
    "window_one_less": ("extend/8x2x64+window=16/32@0/dtype=float32", "a window of one key less"),
    "window_ignored_on_decode": ("decode/8x2x64+window=16/1@31/dtype=float32", "no window"),
    "softcap_dropped": ("decode/8x2x64+softcap=1.5/1@31/dtype=bfloat16", "no soft cap"),
    "sink_dropped": ("decode/8x2x64+sinks/1@31/dtype=float32", "no sink"),
    "missing_scale": ("decode/8x2x64/1@31/dtype=float32", "scores that are not scaled"),
    "key_scale_dropped": ("decode/8x2x64/1@31/dtype=float32/kv_dtype=fp8_e4m3", "keys without their scale"),
    "value_scale_dropped": ("decode/8x2x64/1@31/dtype=float32/kv_dtype=fp8_e4m3", "values without their scale"),
    "page_table_ignored": ("decode/8x2x64/1@47/dtype=float32/memory=descending", "pages that follow each other"),
    "tree_transposed": ("verify/8x2x64/5@27/dtype=float32/tree=top2", "a transposed tree"),
    "tree_ignored": ("verify/8x2x64/5@27/dtype=float32/tree=top2", "a chain in place of the tree"),
    "spans_ignored": ("extend/8x2x64/32@0/dtype=float32/spans", "no spans"),
    "lse_base_two": ("decode/8x2x64/1@31/dtype=float32/lse", "an LSE in base 2"),
    "first_request_for_all": ("decode/8x2x64/1@31,1@20/batch=2/dtype=float32", "the pages of the first request"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_known_mistake_is_named(name: str) -> None:
    text, mistake = CASES[name]
    liar = liars()[f"liar_{name}"]
    with register(liar.cls, manifest(liar)) as ref:
        result = run_case(Case.parse(text), Target(ref, System("cpu"), torch.device("cpu")), look=True)
    assert result.faults[0].message.endswith(f"; it is right for {mistake}")


def test_another_mistake_is_not_named() -> None:
    liar = liars()["liar_wrong_scale"]
    with register(liar.cls, manifest(liar)) as ref:
        target = Target(ref, System("cpu"), torch.device("cpu"))
        result = run_case(replace(Case.parse("decode/8x2x64/1@31/dtype=float32"), seed=3), target, look=True)
    assert result.faults
    assert not any("it is right for" in fault.message for fault in result.faults)
