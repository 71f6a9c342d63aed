"""The loopback backend: right answers, and a record of what it was asked."""

from __future__ import annotations

from dataclasses import replace

import torch
from attn_core.planning.claims import PageSet
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import plan
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.generation import generate_cases, spread
from attn_core.testing.loopback import LoopbackBackend, loopback
from attn_core.testing.run import Target, run_case
from attn_core.testing.runner import verify


def test_a_router_sends_each_half_of_a_mixed_batch_to_its_backend() -> None:
    kind = LayerKind(4, 2, 16, 16, layer_ids=(0,))
    config = AttentionConfig((kind,), dtype="float32", page_size=4, kv_layout="NHD")
    with loopback("prefiller", ("prefill",)), loopback("decoder", ("decode",)) as (_, installed):
        chosen = plan(config, "prefill=prefiller,decode=decoder", system=System("cpu"), installed=installed)
        cache = KVCache.allocate(chosen.config, num_pages=8)
        router = build(chosen, cache, installed=installed)
    batch = ForwardBatch.build(
        ForwardMode.MIXED, query_lens=[1, 3], seq_lens=[5, 3], pages=[[1, 2], [3]], page_size=4
    )  # fmt: skip
    router.init_forward_metadata(batch)
    q, k = torch.randn(4, 4, 16), torch.randn(4, 2, 16)
    router.forward(q, k, k, AttentionLayer.of_kind(kind, 0), batch)
    prefiller, decoder = (router.backends[phase] for phase in ("prefill", "decode"))
    assert isinstance(prefiller, LoopbackBackend)
    assert isinstance(decoder, LoopbackBackend)
    assert [(c.function, c.num_tokens) for c in decoder.calls if c.function.startswith("forward")] == [
        ("forward_decode", 1)
    ]
    assert [(c.function, c.num_tokens) for c in prefiller.calls if c.function.startswith("forward")] == [
        ("forward_extend", 3)
    ]


def test_it_passes_the_kit_itself() -> None:
    with loopback():
        assert verify("loopback", max_cases=60, probe=False).exit_code == 0


def test_pages_that_it_has_not_are_split_for_it(target: Target) -> None:
    """Eager steps, several in flight, graphs: the kit sees the rewritten page table through to the end."""
    with loopback() as (ref, _):
        few = tuple(replace(clause, pages=PageSet.of(16)) for clause in ref.manifest.clauses)
        own = replace(target, ref=replace(ref, manifest=replace(ref.manifest, clauses=few)))
        cases = [c for c in generate_cases(own.ref.manifest, "contract", own.system) if c.page_size == 48]
        assert {c.mode for c in cases} >= {"extend", "decode", "verify", "mixed", "draft_extend"}
        assert any("graph" in c.options for c in cases)
        wrong = [r for case in spread(cases, 40) if (r := run_case(case, own)).status != "passed"]
    assert [f"{r.case.id}: {r.faults}" for r in wrong] == []
