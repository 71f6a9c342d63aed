"""A wrong answer is named by the mistake that gives it, where it is a known one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_core.planning.config import LayerKind
from attn_core.planning.discovery import register
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.cases import Case
from attn_core.testing.liars.base import Liar, Mutant
from attn_core.testing.liars.registry import liars, manifest
from attn_core.testing.run import Target, run_case

PLAIN = AttentionLayer.of_kind(LayerKind(8, 2, 64, 64), 0)
CASES = {
    "window_one_more": ("decode/8x2x64+window=16/1@31/dtype=float32", "a window of one key more"),
    "window_one_less": ("extend/8x2x64+window=16/32@0/dtype=float32", "a window of one key less"),
    "window_ignored_on_decode": ("decode/8x2x64+window=16/1@31/dtype=float32", "no window"),
    "softcap_dropped": ("decode/8x2x64+softcap=1.5/1@31/dtype=bfloat16", "no soft cap"),
    "sink_dropped": ("decode/8x2x64+sinks/1@31/dtype=float32", "no sink"),
    "sink_twice": ("decode/8x2x64+sinks/1@31/dtype=float32", "a sink that counts twice"),
    "sink_scaled": ("decode/8x2x64+sinks/1@31/dtype=float32", "a sink that is scaled like a score"),
    "scale_of_the_width": (
        "decode/8x2x64+scale=0.188/1@31/dtype=float32",
        "the width of the keys to the -1/2 as scale",
    ),
    "heads_transposed": ("extend/6x2x64+sinks/32@0/dtype=float32/lse", "query heads that take the KV heads in turn"),
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


def capped_before_scale(layer: AttentionLayer, batch: ForwardBatch) -> tuple[AttentionLayer, ForwardBatch]:
    return replace(layer, softcap=layer.softcap * layer.scale), batch


def capped_sinks(layer: AttentionLayer, batch: ForwardBatch) -> tuple[AttentionLayer, ForwardBatch]:
    assert layer.sinks is not None
    return replace(layer, sinks=layer.softcap * torch.tanh(layer.sinks.float() / layer.softcap)), batch


def uncausal(layer: AttentionLayer, batch: ForwardBatch) -> tuple[AttentionLayer, ForwardBatch]:
    return layer, replace(batch, spans=torch.tensor([[[0, int(n)]] for n in batch.seq_lens], dtype=torch.int32))


Alter = Callable[[AttentionLayer, ForwardBatch], tuple[AttentionLayer, ForwardBatch]]
ALTERED: dict[str, tuple[Alter, str]] = {
    "a soft cap before the scale": (capped_before_scale, "extend/8x2x64+softcap=1.5/32@0/dtype=float32"),
    "a sink that is capped like a score": (capped_sinks, "decode/8x2x64+softcap=1.5+sinks/1@31/dtype=float32"),
    "queries that see what comes after them": (uncausal, "extend/8x2x64/32@0,5@16/batch=2/dtype=float32"),
}


@pytest.mark.parametrize("mistake", ALTERED)
def test_a_mistake_that_no_liar_has_is_named(mistake: str) -> None:
    alter, text = ALTERED[mistake]

    class LiarAltered(Mutant):
        """The mistake of the case."""

        name = "liar_altered"

        def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
            return alter(layer, batch)[0]

        def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
            return uncausal(PLAIN, batch)[1] if alter is uncausal else batch

    with register(LiarAltered, manifest(Liar(LiarAltered, ("attention",), {}))) as ref:
        result = run_case(Case.parse(text), Target(ref, System("cpu"), torch.device("cpu")), look=True)
    assert result.faults[0].message.endswith(f"; it is right for {mistake}")


def test_another_mistake_is_not_named() -> None:
    liar = liars()["liar_wrong_scale"]
    with register(liar.cls, manifest(liar)) as ref:
        target = Target(ref, System("cpu"), torch.device("cpu"))
        result = run_case(replace(Case.parse("decode/8x2x64/1@31/dtype=float32"), seed=3), target, look=True)
    assert result.faults
    assert not any("it is right for" in fault.message for fault in result.faults)
