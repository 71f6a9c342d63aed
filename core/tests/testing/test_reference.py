"""The oracle against maths that is not its own: torch's SDPA in fp64, and sums small enough to do by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attn_core.errors import ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference, reference_ragged
from torch import Tensor

PAGE = 4


def made(
    kind: LayerKind, *, layout: str = "NHD", kv_dtype: str = "auto", pages: int = 12
) -> tuple[KVCache, AttentionLayer]:
    """A cache of random content and a layer of ``kind`` over it."""
    config = AttentionConfig((kind,), dtype="float32", kv_cache_dtype=kv_dtype, page_size=PAGE, kv_layout=layout)
    cache = KVCache.allocate(config, num_pages=pages)
    generator = torch.Generator().manual_seed(3)
    for tensor in (cache.k(0), cache.v(0)):
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    sinks = torch.randn(kind.num_q_heads, generator=generator) if kind.sinks else None
    scales = {"k_scale": 0.5, "v_scale": 0.25} if kv_dtype != "auto" else {}
    return cache, AttentionLayer.of_kind(kind, 0, sinks=sinks, **scales)


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """torch's own attention in fp64: q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv] -> [n, Hq, Dv]."""
    heads = [t.double().transpose(0, 1)[None] for t in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def tokens(cache: KVCache, pages: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence, put together page by page."""
    k, v = (torch.cat([pool[p] for p in pages])[:count] for pool in (cache.k_nhd(0).double(), cache.v_nhd(0).double()))
    return k, v


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (7, 1)])
def test_causal_attention_over_pages_is_torchs_own(layout: str, window: int | None, heads: tuple[int, int]) -> None:
    kind = LayerKind(*heads, 16, 16, sliding_window=window)
    cache, layer = made(kind, layout=layout)
    pages = [[3, 1, 8], [5], [7, 2]]
    batch = ForwardBatch.build(
        ForwardMode.EXTEND, query_lens=[3, 0, 5], seq_lens=[11, 2, 5], pages=pages, page_size=PAGE
    )  # fmt: skip
    q = torch.randn(8, heads[0], 16)
    out, _ = reference(q, layer, batch, cache)
    for rows, b, count in ((slice(0, 3), 0, 11), (slice(3, 8), 2, 5)):
        k, v = tokens(cache, pages[b], count)
        n = rows.stop - rows.start
        position = torch.arange(count - n, count)[:, None]
        key = torch.arange(count)[None]
        visible = (key <= position) & (key > position - (window or 1000))
        torch.testing.assert_close(out[rows], sdpa(q[rows], k, v, visible, layer.scale), atol=1e-12, rtol=0)


def test_lse_is_the_natural_log_of_the_denominator_and_counts_the_sink() -> None:
    kind = LayerKind(1, 1, 2, 2, scale=1.0, sinks=True)
    cache, layer = made(kind)
    layer.sinks = torch.tensor([0.5])
    cache.k(0)[1, :2, 0] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    cache.v(0)[1, :2, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # type: ignore[index]
    batch = ForwardBatch.build(ForwardMode.DECODE, query_lens=[1], seq_lens=[2], pages=[[1]], page_size=PAGE)
    out, lse = reference(torch.tensor([[[1.0, 1.0]]]), layer, batch, cache)
    denominator = math.e**1 + math.e**2 + math.e**0.5
    assert lse.item() == pytest.approx(math.log(denominator), abs=1e-12)
    assert out[0, 0].tolist() == pytest.approx([math.e / denominator, math.e**2 / denominator], abs=1e-12)


def test_softcap_comes_before_the_mask() -> None:
    cache, layer = made(LayerKind(1, 1, 2, 2, scale=1.0, softcap=2.0))
    cache.k(0)[1, :3, 0] = torch.tensor([[3.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    cache.v(0)[1, :3, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]])  # type: ignore[index]
    batch = ForwardBatch.build(ForwardMode.EXTEND, query_lens=[2], seq_lens=[3], pages=[[1]], page_size=PAGE)
    out, _ = reference(torch.ones(2, 1, 2), layer, batch, cache)
    a, b = (math.exp(2 * math.tanh(score / 2)) for score in (3.0, 1.0))
    assert out[0, 0].tolist() == pytest.approx([a / (a + b), b / (a + b)], abs=1e-12)


def test_a_tree_hides_branches_and_counts_positions_for_the_window() -> None:
    cache, layer = made(LayerKind(2, 1, 8, 8, sliding_window=2))
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0, 2]]))
    batch = ForwardBatch.build(
        ForwardMode.TARGET_VERIFY, query_lens=[4], seq_lens=[7], pages=[[3, 1]], page_size=PAGE, tree=tree
    )  # fmt: skip
    q = torch.randn(4, 2, 8)
    out, _ = reference(q, layer, batch, cache)
    k, v = tokens(cache, [3, 1], 7)
    # prefix 0, 1, 2; the root stands at 3, its children at 4, their child at 5: two keys each
    seen = [[2, 3], [3, 4], [3, 5], [5, 6]]
    visible = torch.zeros(4, 7, dtype=torch.bool)
    for row, keys in enumerate(seen):
        visible[row, keys] = True
    torch.testing.assert_close(out, sdpa(q, k, v, visible, layer.scale), atol=1e-12, rtol=0)


def test_spans_see_themselves_both_ways_and_the_window_bounds_how_far_back() -> None:
    cache, layer = made(LayerKind(2, 1, 8, 8, sliding_window=3))
    batch = ForwardBatch.build(
        ForwardMode.EXTEND, query_lens=[6], seq_lens=[6], pages=[[3, 1]], page_size=PAGE, spans=[[(1, 5)]]
    )  # fmt: skip
    q = torch.randn(6, 2, 8)
    out, _ = reference(q, layer, batch, cache)
    k, v = tokens(cache, [3, 1], 6)
    visible = torch.zeros(6, 6, dtype=torch.bool)
    for row, keys in enumerate([range(1), range(5), range(5), range(1, 5), range(2, 5), range(3, 6)]):
        visible[row, list(keys)] = True
    torch.testing.assert_close(out, sdpa(q, k, v, visible, layer.scale), atol=1e-12, rtol=0)


def test_cross_layers_see_the_whole_encoder_and_refuse_a_window() -> None:
    cache, layer = made(LayerKind(2, 2, 8, 8, cross=True))
    batch = ForwardBatch.build(
        ForwardMode.DECODE, query_lens=[1], seq_lens=[2], pages=[[3]], page_size=PAGE,
        encoder_seq_lens=[6], encoder_pages=[[9, 4]],
    )  # fmt: skip
    q = torch.randn(1, 2, 8)
    k, v = tokens(cache, [9, 4], 6)
    expected = sdpa(q, k, v, torch.ones(1, 6, dtype=torch.bool), layer.scale)
    torch.testing.assert_close(reference(q, layer, batch, cache)[0], expected, atol=1e-12, rtol=0)
    with pytest.raises(ConfigError, match="window"):
        reference(q, replace(layer, sliding_window=4), batch, cache)


def test_mla_values_are_the_first_of_the_latent_row() -> None:
    cache, layer = made(LayerKind(3, 1, 12, 8, kind="mla", scale=0.3), layout="MLA")
    batch = ForwardBatch.build(ForwardMode.DECODE, query_lens=[1], seq_lens=[6], pages=[[2, 5]], page_size=PAGE)
    q = torch.randn(1, 3, 12)
    k, _ = (torch.cat([cache.k_nhd(0)[p] for p in (2, 5)])[:6] for _ in range(2))
    expected = sdpa(q, k, k[..., :8], torch.ones(1, 6, dtype=torch.bool), 0.3)
    torch.testing.assert_close(reference(q, layer, batch, cache)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_an_fp8_cache_means_what_it_stores_times_the_scale(kv_dtype: str) -> None:
    cache, layer = made(LayerKind(2, 2, 8, 8), kv_dtype=kv_dtype)
    batch = ForwardBatch.build(ForwardMode.DECODE, query_lens=[1], seq_lens=[6], pages=[[2, 5]], page_size=PAGE)
    q = torch.randn(1, 2, 8)
    k, v = tokens(cache, [2, 5], 6)
    expected = sdpa(q, k * 0.5, v * 0.25, torch.ones(1, 6, dtype=torch.bool), layer.scale)
    torch.testing.assert_close(reference(q, layer, batch, cache)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_keys_align_the_last_query_with_the_last_key(causal: bool) -> None:
    layer = AttentionLayer(0, 4, 2, 8, 6, 0.4)
    starts, key_starts = torch.tensor([0, 3, 5]), torch.tensor([0, 5, 7])
    q, k, v = torch.randn(5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 6)
    out, _ = reference_ragged(q, k, v, layer, query_start_loc=starts, key_start_loc=key_starts, causal=causal)
    for rows, keys in ((slice(0, 3), slice(0, 5)), (slice(3, 5), slice(5, 7))):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        visible = torch.ones(n, m, dtype=torch.bool)
        visible = visible.tril(m - n) if causal else visible
        expected = sdpa(q[rows], k[keys], v[keys], visible, 0.4)
        torch.testing.assert_close(out[rows], expected, atol=1e-12, rtol=0)


def test_a_query_without_keys_gives_zero_and_minus_infinity() -> None:
    layer = AttentionLayer(0, 2, 2, 8, 8, 0.4)
    none, starts = torch.randn(0, 2, 8), torch.tensor([0, 2])
    out, lse = reference_ragged(
        torch.randn(2, 2, 8), none, none, layer, query_start_loc=starts, key_start_loc=torch.tensor([0, 0]), causal=True
    )
    assert not out.any()
    assert torch.equal(lse, torch.full((2, 2), -math.inf, dtype=torch.float64))
