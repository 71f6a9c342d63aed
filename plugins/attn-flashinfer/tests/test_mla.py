"""`flashinfer_mla` against the oracle, over the stand-in library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attn_core.errors import BatchError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference
from attn_flashinfer.mla import FlashInferMLABackend
from fake_flashinfer import FakeFlashInfer

STEPS = {
    "decode": (ForwardMode.DECODE, [1, 1, 1], [1, 9, 16]),
    "prefill": (ForwardMode.EXTEND, [5, 8, 1], [5, 8, 1]),
    "prefix": (ForwardMode.EXTEND, [5, 3, 2], [17, 3, 12]),
    "mixed": (ForwardMode.MIXED, [1, 1, 6], [4, 11, 13]),
    "chain": (ForwardMode.TARGET_VERIFY, [4, 4], [13, 4]),
    "draft extend": (ForwardMode.DRAFT_EXTEND, [2, 1], [13, 4]),
}


def config_of(heads: int = 4, **serving: Any) -> AttentionConfig:
    kind = LayerKind(heads, 1, 576, 512, kind="mla", scale=192**-0.5)
    return AttentionConfig(layers=(kind,), **{"page_size": 4, "kv_layout": "MLA", **serving})


def batch_of(mode: ForwardMode, query: list[int], lens: list[int], page_size: int = 4, **more: Any) -> ForwardBatch:
    page, pages = 60, []
    for length in lens:
        count = -(-length // page_size)
        pages.append(list(range(page, page - count, -1)))
        page -= count
    return ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=page_size, **more)


def random_cache(config: AttentionConfig) -> KVCache:
    cache = KVCache.allocate(config, num_pages=64)
    cache.k(0).copy_(torch.randn(cache.k(0).shape))
    return cache


def check_step(config: AttentionConfig, batch: ForwardBatch, **layer_options: Any) -> None:
    torch.manual_seed(0)
    cache = random_cache(config)
    layer = AttentionLayer.of_kind(config.layers[0], 0, **layer_options)
    backend = FlashInferMLABackend(config, cache)
    q = torch.randn(batch.num_tokens, layer.num_q_heads, 576).bfloat16()
    k = torch.randn(batch.num_tokens, 1, 576).bfloat16()
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, k, None, layer, batch, return_lse=True)
    want, want_lse = reference(q, layer, batch, cache)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    mine = torch.full_like(out, 7.0)
    assert backend.forward(q, None, None, layer, batch, save_kv_cache=False, out=mine) is mine
    torch.testing.assert_close(mine.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", [1, 3, 7, 16, 128])
def test_every_step_is_right_with_any_number_of_heads(fake: FakeFlashInfer, step: str, heads: int) -> None:
    check_step(config_of(heads), batch_of(*STEPS[step]))


@pytest.mark.parametrize("step", ["decode", "prefix"])
def test_an_fp8_latent_with_its_scale(fake: FakeFlashInfer, step: str) -> None:
    check_step(config_of(kv_cache_dtype="fp8_e4m3"), batch_of(*STEPS[step]), k_scale=0.5)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_any_page_size(fake: FakeFlashInfer, page_size: int) -> None:
    check_step(config_of(page_size=page_size), batch_of(ForwardMode.EXTEND, [5, 2], [9, 7], page_size))


@pytest.mark.parametrize("q", [1, 3])
def test_replay_reads_the_batch_of_the_replay(fake: FakeFlashInfer, q: int) -> None:
    torch.manual_seed(0)
    config = config_of(3, max_context_len=40)
    cache = random_cache(config)
    backend, layer = FlashInferMLABackend(config, cache), AttentionLayer.of_kind(config.layers[0], 0)
    mode = ForwardMode.DECODE if q == 1 else ForwardMode.TARGET_VERIFY
    backend.init_cuda_graph_state(4, 4 * q)
    captured = {}
    for lens in ([6, 7], [9, 3, 8]):
        captured[len(lens)] = batch = batch_of(mode, [q] * len(lens), lens)
        backend.init_forward_metadata_capture_cuda_graph(batch)
    for lens in ([31, 18], [7, 12, 29], [9, 40]):
        replayed = batch_of(mode, [q] * len(lens), lens)
        backend.init_forward_metadata_replay_cuda_graph(replayed)
        queries = torch.randn(replayed.num_tokens, 3, 576).bfloat16()
        out = backend.forward(queries, None, None, layer, captured[len(lens)], save_kv_cache=False)
        torch.testing.assert_close(out.double(), reference(queries, layer, replayed, cache)[0], atol=2e-2, rtol=2e-2)


def test_trees_are_refused(fake: FakeFlashInfer) -> None:
    config = config_of()
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0]]))
    batch = batch_of(ForwardMode.TARGET_VERIFY, [3], [9], tree=tree)
    backend = FlashInferMLABackend(config, random_cache(config))
    with pytest.raises(BatchError, match="tree of drafts"):
        backend.init_forward_metadata(batch)


def test_warmup_plans_decode_prefill_and_verify(fake: FakeFlashInfer) -> None:
    config = config_of(speculative_num_draft_tokens=3)
    FlashInferMLABackend(config, random_cache(config)).warmup(config)
    assert {a["causal"] for _, a in fake.plans} == {True, False}
    assert len(fake.plans) == 3
