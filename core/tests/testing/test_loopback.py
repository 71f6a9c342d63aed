"""The loopback backend: right answers, and a record of what it was asked."""

from __future__ import annotations

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import plan
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.loopback import LoopbackBackend, loopback
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
        assert verify("loopback", max_cases=60).exit_code == 0
