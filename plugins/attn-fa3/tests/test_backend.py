"""The backend against the oracle, over the stand-in library: every phase, mask, layout and base of the contract."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from attn_core.errors import BatchError, CapacityError, ConfigError, KernelError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference, reference_ragged
from attn_fa3.backend import FA3Backend
from fake_flash_attention import FakeFlashAttention
from torch import Tensor

KIND = LayerKind(num_q_heads=6, num_kv_heads=2, qk_head_dim=16, v_head_dim=16)
MLA = LayerKind(num_q_heads=4, num_kv_heads=1, qk_head_dim=576, v_head_dim=512, kind="mla", scale=192**-0.5)
PARENTS = [[-1, 0, 0, 1, 3, -1], [-1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2]]


def config_of(*kinds: LayerKind, **serving: Any) -> AttentionConfig:
    layout = "MLA" if kinds[0].kind == "mla" else "NHD"
    numbered = tuple(replace(kind, layer_ids=(i,)) for i, kind in enumerate(kinds))
    return AttentionConfig(layers=numbered, **{"page_size": 4, "kv_layout": layout, **serving})


def batch_of(mode: ForwardMode, query: list[int], lens: list[int], page_size: int = 4, **more: Any) -> ForwardBatch:
    """A batch whose pages are handed out in descending order, so that a table read wrongly shows."""
    page, pages = 60, []
    for length in lens:
        count = -(-length // page_size)
        pages.append(list(range(page, page - count, -1)))
        page -= count
    return ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=page_size, **more)


def random_cache(config: AttentionConfig) -> KVCache:
    cache = KVCache.allocate(config, num_pages=64)
    for i in cache.layer_ids:
        cache.k(i).copy_(torch.randn(cache.k(i).shape))
        values = cache.v(i)
        if values is not None:
            values.copy_(torch.randn(values.shape))
    return cache


def layer_of(config: AttentionConfig, i: int = 0, sinks_dtype: torch.dtype = torch.float32) -> AttentionLayer:
    kind = config.layers[i]
    scales = {} if config.kv_cache_dtype == "auto" else {"k_scale": 0.5, "v_scale": 1.5}
    sinks = torch.randn(kind.num_q_heads).to(sinks_dtype) if kind.sinks else None
    return AttentionLayer.of_kind(kind, i, sinks=sinks, **scales)


def inputs(kind: LayerKind, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor | None]:
    q = torch.randn(tokens, kind.num_q_heads, kind.qk_head_dim).to(dtype)
    k = torch.randn(tokens, kind.num_kv_heads, kind.qk_head_dim).to(dtype)
    v = torch.randn(tokens, kind.num_kv_heads, kind.v_head_dim).to(dtype)
    return q, k, None if kind.kind == "mla" else v


def check_step(config: AttentionConfig, batch: ForwardBatch, i: int = 0, **layer_options: Any) -> None:
    """One forward of layer ``i``, with LSE and without, against the oracle."""
    torch.manual_seed(0)
    cache = random_cache(config)
    layer = layer_of(config, i, **layer_options)
    backend = FA3Backend(config, cache)
    q, k, v = inputs(config.layers[i], batch.num_tokens)
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, k, v, layer, batch, return_lse=True)
    want, want_lse = reference(q, layer, batch, cache)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    mine = torch.full_like(out, 7.0)
    again = backend.forward(q, None, None, layer, batch, save_kv_cache=False, out=mine)
    assert again is mine
    torch.testing.assert_close(mine.double(), want, atol=2e-2, rtol=2e-2)


FEATURES = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window longer than all": {"sliding_window": 1000},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 7, "softcap": 3.0, "sinks": True},
}
STEPS = {
    "decode": (ForwardMode.DECODE, [1, 1, 1], [1, 9, 16]),
    "prefill": (ForwardMode.EXTEND, [5, 8, 1], [5, 8, 1]),
    "prefix": (ForwardMode.EXTEND, [5, 3, 2], [17, 3, 12]),
    "empty request": (ForwardMode.EXTEND, [5, 0, 2], [17, 0, 12]),
    "mixed": (ForwardMode.MIXED, [1, 1, 6], [4, 11, 13]),
    "chain": (ForwardMode.TARGET_VERIFY, [4, 4], [13, 4]),
    "draft extend": (ForwardMode.DRAFT_EXTEND, [2, 1], [13, 4]),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_step_with_every_feature_is_right(fake: FakeFlashAttention, step: str, feature: str) -> None:
    mode, query, lens = STEPS[step]
    check_step(config_of(replace(KIND, **FEATURES[feature])), batch_of(mode, query, lens))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7, 9, 100])
@pytest.mark.parametrize("features", [{}, {"sinks": True}, {"softcap": 3.0}])
def test_a_tree_counts_positions_not_places(fake: FakeFlashAttention, window: int | None, features: dict) -> None:
    config = config_of(replace(KIND, sliding_window=window, **features))
    tree = TreeMask.from_parents(torch.tensor(PARENTS))
    check_step(config, batch_of(ForwardMode.TARGET_VERIFY, [6, 6, 6], [14, 6, 9], tree=tree))


def test_a_tree_with_dead_branches_is_right(fake: FakeFlashAttention) -> None:
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 1, 1]]))
    tree.visible[0, 3] = torch.tensor([False, False, False, True])
    check_step(config_of(KIND), batch_of(ForwardMode.TARGET_VERIFY, [4], [11], tree=tree))


def test_a_tree_is_right_in_pages_that_do_not_follow_each_other(fake: FakeFlashAttention) -> None:
    config = config_of(KIND)
    both = torch.randn(64, 2, 4, 2, 16).to(torch.bfloat16)
    cache = KVCache({0: both[:, 0]}, {0: both[:, 1]}, page_size=4, layout="NHD")
    tree = TreeMask.from_parents(torch.tensor(PARENTS[:1]))
    batch = batch_of(ForwardMode.TARGET_VERIFY, [6], [14], tree=tree)
    backend, layer = FA3Backend(config, cache), layer_of(config)
    q, k, v = inputs(KIND, 6)
    backend.init_forward_metadata(batch)
    out = backend.forward(q, k, v, layer, batch)
    torch.testing.assert_close(out.double(), reference(q, layer, batch, cache)[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("step", ["decode", "prefix", "chain"])
def test_hnd_is_read_by_strides(fake: FakeFlashAttention, step: str) -> None:
    mode, query, lens = STEPS[step]
    check_step(config_of(KIND, kv_layout="HND"), batch_of(mode, query, lens))


@pytest.mark.parametrize("step", STEPS)
def test_an_fp8_cache_with_scales_and_quantised_queries(fake: FakeFlashAttention, step: str) -> None:
    """Queries keep 4 significant bits, so the bound is wider here; a scale left out would be far outside of it."""
    config = config_of(KIND, kv_cache_dtype="fp8_e4m3")
    torch.manual_seed(0)
    cache, batch = random_cache(config), batch_of(*STEPS[step])
    backend, layer = FA3Backend(config, cache), layer_of(config)
    q, k, v = inputs(KIND, batch.num_tokens)
    q[: max(1, len(q) // 2)] *= 500.0  # one request's queries beyond e4m3's range, another's small
    backend.init_forward_metadata(batch)
    out = backend.forward(q, k, v, layer, batch)
    exact = quantize_exactly(q, batch, layer)
    torch.testing.assert_close(out.double(), reference(exact, layer, batch, cache)[0], atol=5e-2, rtol=5e-2)


def quantize_exactly(q: Tensor, batch: ForwardBatch, layer: AttentionLayer) -> Tensor:
    """The queries as e4m3 holds them with one scale for each request and KV head, in a loop."""
    found = q.double()
    starts = batch.query_start_loc.tolist()
    for lo, hi in pairwise(starts):
        for head in range(layer.num_kv_heads):
            own = slice(head * layer.group_size, (head + 1) * layer.group_size)
            part = q[lo:hi, own].float()
            if part.numel():
                scale = part.abs().max() / 448
                found[lo:hi, own] = (part / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return found


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_any_page_size(fake: FakeFlashAttention, page_size: int) -> None:
    check_step(config_of(KIND, page_size=page_size), batch_of(ForwardMode.EXTEND, [5, 2], [9, 7], page_size))


@pytest.mark.parametrize("lens", [[70, 20], [65, 128]])
def test_what_lies_behind_the_end_in_a_page_of_a_whole_tile_changes_nothing(
    fake: FakeFlashAttention, lens: list[int]
) -> None:
    """Seen on an H200 with pages of 128 and 256: a NaN there reached the output."""
    torch.manual_seed(0)
    config = config_of(KIND, page_size=64)
    cache, layer = random_cache(config), layer_of(config)
    batch = batch_of(ForwardMode.EXTEND, lens, lens, 64)
    backend = FA3Backend(config, cache)
    q, k, v = inputs(KIND, batch.num_tokens)
    cache.k(0).fill_(float("nan"))
    cache.v(0).fill_(float("nan"))
    backend.init_forward_metadata(batch)
    out = backend.forward(q, k, v, layer, batch)
    torch.testing.assert_close(out.double(), reference(q, layer, batch, cache)[0], atol=2e-2, rtol=2e-2)
    assert fake.calls[-1]["leftpad_k"] is not None
    few = batch_of(ForwardMode.DECODE, [1, 1], lens, 64)
    backend.init_forward_metadata(few)
    backend.forward(inputs(KIND, 2)[0], None, None, layer, few, save_kv_cache=False)
    assert fake.calls[-1]["leftpad_k"] is None, "few queries are loaded token by token anyway"


@pytest.mark.parametrize("step", ["decode", "prefix", "chain", "mixed"])
def test_absorbed_mla_goes_through_qv(fake: FakeFlashAttention, step: str) -> None:
    mode, query, lens = STEPS[step]
    check_step(config_of(MLA), batch_of(mode, query, lens))
    assert all(call["q_v"] is not None for call in fake.calls)


def test_cross_keys_are_the_encoders_and_not_causal(fake: FakeFlashAttention) -> None:
    config = config_of(KIND, replace(KIND, cross=True))
    batch = batch_of(ForwardMode.EXTEND, [3, 2], [5, 2], encoder_seq_lens=[7, 0], encoder_pages=[[5, 4], []])
    torch.manual_seed(0)
    cache = random_cache(config)
    layer, backend = layer_of(config, 1), FA3Backend(config, cache)
    q, _, _ = inputs(KIND, 5)
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, None, None, layer, batch, return_lse=True)
    want, want_lse = reference(q, layer, batch, cache)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(16, 16), (192, 128)])
def test_ragged(fake: FakeFlashAttention, causal: bool, dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    kind = replace(KIND, qk_head_dim=dims[0], v_head_dim=dims[1], ragged=True, sinks=True)
    config = config_of(KIND, kind)
    layer = AttentionLayer.of_kind(kind, 1, sinks=torch.randn(6))
    q = torch.randn(6, 6, dims[0]).to(torch.bfloat16)
    k, v = torch.randn(11, 2, dims[0]).to(torch.bfloat16), torch.randn(11, 2, dims[1]).to(torch.bfloat16)
    starts = {"query_start_loc": torch.tensor([0, 4, 6]).int(), "key_start_loc": torch.tensor([0, 8, 11]).int()}
    backend = FA3Backend(config, random_cache(config_of(KIND)))
    out, lse = backend.forward_ragged(
        q, k, v, layer, **starts, max_query_len=4, max_key_len=8, causal=causal, return_lse=True
    )
    want, want_lse = reference_ragged(q, k, v, layer, **starts, causal=causal)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)


def test_a_window_on_keys_that_are_not_causal_is_refused(fake: FakeFlashAttention) -> None:
    config = config_of(KIND)
    layer = AttentionLayer.of_kind(replace(KIND, sliding_window=3, ragged=True), 1)
    q, k, v = inputs(KIND, 4)
    starts = torch.tensor([0, 4]).int()
    with pytest.raises(ConfigError, match="not causal"):
        FA3Backend(config, random_cache(config)).forward_ragged(
            q, k, v, layer, query_start_loc=starts, key_start_loc=starts, max_query_len=4, max_key_len=4, causal=False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_are_folded_in_and_never_given_to_the_library(fake: FakeFlashAttention, dtype: torch.dtype) -> None:
    check_step(config_of(replace(KIND, sinks=True)), batch_of(*STEPS["prefix"]), sinks_dtype=dtype)
    assert {call["sinks"] for call in fake.calls} == {None}


def test_metadata_costs_the_same_for_long_contexts(fake: FakeFlashAttention) -> None:
    """A step is views of what the batch has: the same few operations for 40 keys as for 40000."""
    config = config_of(KIND)
    backend, counts = FA3Backend(config, random_cache(config)), []
    for keys in (40, 40000):
        pages = [list(range(-(-keys // 4)))] * 2
        batch = ForwardBatch.build(ForwardMode.DECODE, query_lens=[1, 1], seq_lens=[keys] * 2, pages=pages, page_size=4)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            backend.init_forward_metadata(batch)
        counts.append({event.key: event.count for event in profile.key_averages()})
    assert counts[0] == counts[1]
    assert set(counts[0]) <= {"aten::slice", "aten::as_strided", "aten::alias"}


def test_the_tile_schedule_is_made_once_a_step_and_kind(fake: FakeFlashAttention) -> None:
    config = config_of(KIND, replace(KIND, sliding_window=5), KIND, replace(KIND, sliding_window=5))
    backend, batch = FA3Backend(config, random_cache(config)), batch_of(*STEPS["decode"])
    q, k, v = inputs(KIND, 3)
    for _ in range(2):
        backend.init_forward_metadata(batch)
        for i in range(4):
            backend.forward(q, k, v, layer_of(config, i), batch)
    assert len(fake.schedules) == 4
    assert [call["scheduler_metadata"] is not None for call in fake.calls] == [True] * 8


def test_batches_in_flight_do_not_disturb_each_other(fake: FakeFlashAttention) -> None:
    torch.manual_seed(0)
    config = config_of(KIND)
    cache = random_cache(config)
    backend, layer = FA3Backend(config, cache), layer_of(config)
    batches = [batch_of(*STEPS["prefix"]), batch_of(*STEPS["decode"])]
    for batch in batches:
        backend.init_forward_metadata(batch)
    for batch in batches:
        q, k, v = inputs(KIND, batch.num_tokens)
        out = backend.forward(q, k, v, layer, batch)
        torch.testing.assert_close(out.double(), reference(q, layer, batch, cache)[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_replay_reads_the_batch_of_the_replay(fake: FakeFlashAttention, tree: bool, window: int | None) -> None:
    """On a CPU a graph is the recorded call run again: its buffers must hold what the replay brought."""
    torch.manual_seed(0)
    config = config_of(replace(KIND, sliding_window=window), speculative_num_draft_tokens=6, max_context_len=40)
    cache = random_cache(config)
    backend, layer = FA3Backend(config, cache), layer_of(config)
    mode, n = (ForwardMode.TARGET_VERIFY, 6) if tree else (ForwardMode.DECODE, 1)

    def make(lens: list[int], rows: list[list[int]]) -> ForwardBatch:
        mask = TreeMask.from_parents(torch.tensor(rows)) if tree else None
        return batch_of(mode, [n] * len(lens), lens, tree=mask)

    backend.init_cuda_graph_state(4, 4 * n)
    captured = make([6, 7], PARENTS[:2])
    backend.init_forward_metadata_capture_cuda_graph(captured)
    q, k, v = inputs(KIND, 2 * n)
    backend.forward(q, k, v, layer, captured)
    replayed = make([31, 18], PARENTS[1:])
    backend.init_forward_metadata_replay_cuda_graph(replayed)
    cache.write(layer, replayed.slot_mapping, k, v)
    out = backend.forward(q, None, None, layer, captured, save_kv_cache=False)
    torch.testing.assert_close(out.double(), reference(q, layer, replayed, cache)[0], atol=2e-2, rtol=2e-2)
    assert {call["num_splits"] for call in fake.calls if call["scheduler_metadata"] is not None} == {32}


def test_graph_limits_are_typed(fake: FakeFlashAttention) -> None:
    config = config_of(KIND, max_context_len=16)
    backend = FA3Backend(config, random_cache(config))
    batch = batch_of(*STEPS["decode"])
    with pytest.raises(BatchError, match="init_cuda_graph_state"):
        backend.init_forward_metadata_capture_cuda_graph(batch)
    backend.init_cuda_graph_state(2, 2)
    with pytest.raises(CapacityError, match="graph of 3 requests"):
        backend.init_forward_metadata_capture_cuda_graph(batch)
    backend.init_cuda_graph_state(3, 3)
    with pytest.raises(BatchError, match="max_context_len"):
        backend.init_forward_metadata_replay_cuda_graph(batch_of(ForwardMode.DECODE, [1], [30]))


def test_batch_invariance_is_one_split(fake: FakeFlashAttention) -> None:
    config = config_of(KIND, batch_invariant=True)
    check_step(config, batch_of(*STEPS["decode"]))
    assert {call["num_splits"] for call in fake.calls} == {1}


def test_what_the_library_raises_becomes_a_kernel_error_with_its_cause(fake: FakeFlashAttention) -> None:
    config = config_of(KIND)
    backend, batch = FA3Backend(config, random_cache(config)), batch_of(*STEPS["decode"])
    backend.init_forward_metadata(batch)
    fake.fail = RuntimeError("This flash attention build does not support paged KV.")
    with pytest.raises(KernelError, match="does not support paged KV") as caught:
        backend.forward(*inputs(KIND, 3), layer_of(config), batch)
    assert caught.value.__cause__ is fake.fail


@pytest.mark.parametrize(
    ("tokens", "heads", "splits"), [(1, 32, 32), (64, 32, 31), (256, 32, 7), (256, 128, 1), (4096, 128, 1)]
)
def test_fixed_splits_stay_in_the_budget(tokens: int, heads: int, splits: int) -> None:
    from attn_fa3.graph_buffers import fixed_splits

    assert fixed_splits(config_of(replace(KIND, num_q_heads=heads, v_head_dim=128, qk_head_dim=128)), tokens) == splits


def test_graph_state_for_256_requests_at_128k_fits_in_64_mib(fake: FakeFlashAttention) -> None:
    config = config_of(KIND, page_size=16, max_context_len=131072)
    backend = FA3Backend(config, KVCache.allocate(config, num_pages=4))
    backend.init_cuda_graph_state(256, 256)
    assert backend._graphs is not None
    assert backend._graphs.nbytes < 64 << 20
