"""`flashinfer` against the oracle, over the stand-in library: every phase, mask, layout and base of the contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import BatchError, CapacityError, ConfigError, KernelError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference, reference_ragged
from attn_flashinfer import choice, graphs
from attn_flashinfer.mha import FlashInferBackend
from fake_flashinfer import FakeFlashInfer
from torch import Tensor

KIND = LayerKind(num_q_heads=6, num_kv_heads=2, qk_head_dim=16, v_head_dim=16)
PARENTS = [[-1, 0, 0, 1, 3, -1], [-1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2]]


def config_of(*kinds: LayerKind, **serving: Any) -> AttentionConfig:
    numbered = tuple(replace(kind, layer_ids=(i,)) for i, kind in enumerate(kinds))
    return AttentionConfig(layers=numbered, **{"page_size": 4, "kv_layout": "NHD", **serving})


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
        assert values is not None
        values.copy_(torch.randn(values.shape))
    return cache


def layer_of(config: AttentionConfig, i: int = 0, **options: Any) -> AttentionLayer:
    kind = config.layers[i]
    return AttentionLayer.of_kind(kind, i, sinks=torch.randn(kind.num_q_heads) if kind.sinks else None, **options)


def inputs(kind: LayerKind, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(tokens, kind.num_q_heads, kind.qk_head_dim).bfloat16()
    k = torch.randn(tokens, kind.num_kv_heads, kind.qk_head_dim).bfloat16()
    return q, k, torch.randn(tokens, kind.num_kv_heads, kind.v_head_dim).bfloat16()


def check_step(config: AttentionConfig, batch: ForwardBatch, i: int = 0, **layer_options: Any) -> None:
    """One forward of layer ``i``, with LSE and without, against the oracle."""
    torch.manual_seed(0)
    cache = random_cache(config)
    layer, backend = layer_of(config, i, **layer_options), FlashInferBackend(config, cache)
    q, k, v = inputs(config.layers[i], batch.num_tokens)
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, k, v, layer, batch, return_lse=True)
    want, want_lse = reference(q, layer, batch, cache)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    for mine in (torch.full_like(out, 7.0), torch.full((*out.shape[:2], 20), 7.0).bfloat16()[..., :16]):
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
    "empty request": (ForwardMode.EXTEND, [5, 0, 0], [17, 0, 12]),
    "mixed": (ForwardMode.MIXED, [1, 1, 6], [4, 11, 13]),
    "chain": (ForwardMode.TARGET_VERIFY, [4, 4], [13, 4]),
    "draft extend": (ForwardMode.DRAFT_EXTEND, [2, 1], [13, 4]),
}
SPANS = [[(2, 9), (12, 15)], [(0, 3)], []]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_step_with_every_feature_is_right(fake: FakeFlashInfer, step: str, feature: str) -> None:
    check_step(config_of(replace(KIND, **FEATURES[feature])), batch_of(*STEPS[step]))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 9, 100])
@pytest.mark.parametrize("features", [{}, {"sinks": True, "softcap": 3.0}])
def test_a_tree_counts_positions_not_places(fake: FakeFlashInfer, window: int | None, features: dict) -> None:
    config = config_of(replace(KIND, sliding_window=window, **features))
    tree = TreeMask.from_parents(torch.tensor(PARENTS))
    check_step(config, batch_of(ForwardMode.TARGET_VERIFY, [6, 6, 6], [14, 6, 9], tree=tree))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_tokens_of_a_span_see_each_other(fake: FakeFlashInfer, window: int | None) -> None:
    config = config_of(replace(KIND, sliding_window=window), bidirectional_spans=True)
    check_step(config, batch_of(ForwardMode.EXTEND, [8, 3, 5], [16, 3, 12], spans=SPANS))


@pytest.mark.parametrize("step", ["decode", "prefix", "chain"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_hnd_and_any_page_size(fake: FakeFlashInfer, step: str, page_size: int) -> None:
    mode, query, lens = STEPS[step]
    check_step(config_of(KIND, kv_layout="HND", page_size=page_size), batch_of(mode, query, lens, page_size))


@pytest.mark.parametrize("step", STEPS)
def test_an_fp8_cache_with_scales(fake: FakeFlashInfer, step: str) -> None:
    config = config_of(replace(KIND, sinks=True, softcap=3.0), kv_cache_dtype="fp8_e4m3")
    check_step(config, batch_of(*STEPS[step]), k_scale=0.5, v_scale=1.5)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE])
def test_cross_keys_are_the_encoders_and_not_causal(fake: FakeFlashInfer, mode: ForwardMode) -> None:
    query = [3, 2] if mode is ForwardMode.EXTEND else [1, 1]
    batch = batch_of(mode, query, [5, 2], encoder_seq_lens=[7, 0], encoder_pages=[[5, 4], []])
    check_step(config_of(KIND, replace(KIND, cross=True, sinks=True)), batch, i=1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(16, 16), (192, 128)])
def test_ragged(fake: FakeFlashInfer, causal: bool, dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    kind = replace(KIND, qk_head_dim=dims[0], v_head_dim=dims[1], ragged=True, sinks=True)
    layer = AttentionLayer.of_kind(kind, 1, sinks=torch.randn(6))
    q = torch.randn(6, 6, dims[0]).bfloat16()
    k, v = torch.randn(11, 2, dims[0]).bfloat16(), torch.randn(11, 2, dims[1]).bfloat16()
    starts = {"query_start_loc": torch.tensor([0, 4, 6]).int(), "key_start_loc": torch.tensor([0, 8, 11]).int()}
    backend = FlashInferBackend(config_of(KIND, kind), random_cache(config_of(KIND)))
    options: dict[str, Any] = {**starts, "max_query_len": 4, "max_key_len": 8, "causal": causal, "return_lse": True}
    out, lse = backend.forward_ragged(q, k, v, layer, **options)
    want, want_lse = reference_ragged(q, k, v, layer, **starts, causal=causal)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    backend.forward_ragged(q, k, v, layer, **options)
    assert len(fake.plans) == 1, "the same starts are planned once"
    starts["query_start_loc"][1] = 3
    out, _ = backend.forward_ragged(q, k, v, layer, **options)
    want, _ = reference_ragged(q, k, v, layer, **starts, causal=causal)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


def test_ragged_starts_of_inference_mode_are_planned_each_time(fake: FakeFlashInfer) -> None:
    """Nobody counts what is written to such tensors, so that a plan made for them may be stale."""
    kind = replace(KIND, ragged=True)
    layer, backend = (
        AttentionLayer.of_kind(kind, 1),
        FlashInferBackend(config_of(KIND, kind), random_cache(config_of(KIND))),
    )
    q, k, v = inputs(KIND, 6)
    with torch.inference_mode():
        starts = torch.tensor([0, 4, 6]).int()
    for middle in (4, 3):
        with torch.inference_mode():
            starts[1] = middle
        out = backend.forward_ragged(
            q, k, v, layer, query_start_loc=starts, key_start_loc=starts, max_query_len=4, max_key_len=4, causal=True
        )
        want, _ = reference_ragged(q, k, v, layer, query_start_loc=starts, key_start_loc=starts, causal=True)
        torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


def test_a_window_on_keys_that_are_not_causal_is_refused(fake: FakeFlashInfer) -> None:
    config = config_of(KIND)
    layer = AttentionLayer.of_kind(replace(KIND, sliding_window=3, ragged=True), 1)
    starts = torch.tensor([0, 4]).int()
    with pytest.raises(ConfigError, match="not causal"):
        FlashInferBackend(config, random_cache(config)).forward_ragged(
            *inputs(KIND, 4), layer, query_start_loc=starts, key_start_loc=starts, max_query_len=4, max_key_len=4,
            causal=False,
        )  # fmt: skip


def test_one_plan_a_step_and_shape_of_layer(fake: FakeFlashInfer) -> None:
    config = config_of(KIND, replace(KIND, sliding_window=5), KIND, replace(KIND, sliding_window=5))
    backend = FlashInferBackend(config, random_cache(config))
    for _ in range(3):
        batch = batch_of(*STEPS["decode"])
        backend.init_forward_metadata(batch)
        for i in range(4):
            backend.forward(*inputs(KIND, 3), layer_of(config, i), batch)
    assert len(fake.plans) == 6
    assert len(fake.made) == 2, "the wrappers of a step that is gone are used again"


def test_batches_in_flight_have_wrappers_of_their_own(fake: FakeFlashInfer) -> None:
    torch.manual_seed(0)
    config = config_of(KIND)
    cache = random_cache(config)
    backend, layer = FlashInferBackend(config, cache), layer_of(config)
    batches = [batch_of(*STEPS["prefix"]), batch_of(*STEPS["prefill"])]
    for batch in batches:
        backend.init_forward_metadata(batch)
    for batch in batches:
        q, k, v = inputs(KIND, batch.num_tokens)
        out = backend.forward(q, k, v, layer, batch)
        torch.testing.assert_close(out.double(), reference(q, layer, batch, cache)[0], atol=2e-2, rtol=2e-2)
    assert len(fake.made) == 2


@pytest.mark.parametrize("what", ["decode", "chain", "tree"])
@pytest.mark.parametrize("window", [None, 5])
def test_replay_reads_the_batch_of_the_replay(fake: FakeFlashInfer, what: str, window: int | None) -> None:
    """On a CPU a graph is the recorded call run again: its buffers and plans must be those of the replay."""
    torch.manual_seed(0)
    kinds = (replace(KIND, sliding_window=window), KIND)
    config = config_of(*kinds, speculative_num_draft_tokens=6, max_context_len=40)
    cache = random_cache(config)
    backend = FlashInferBackend(config, cache)
    mode, n = (ForwardMode.DECODE, 1) if what == "decode" else (ForwardMode.TARGET_VERIFY, 6)

    def make(lens: list[int], rows: list[list[int]]) -> ForwardBatch:
        mask = TreeMask.from_parents(torch.tensor(rows)) if what == "tree" else None
        return batch_of(mode, [n] * len(lens), lens, tree=mask)

    backend.init_cuda_graph_state(4, 4 * n)
    captured = {}
    for lens in ([6, 7], [9, 6, 8]):
        batch = make(lens, PARENTS[: len(lens)])
        backend.init_forward_metadata_capture_cuda_graph(batch)
        captured[len(lens)] = batch
    for lens in ([31, 18], [7, 12, 29], [9, 40]):
        replayed = make(lens, PARENTS[-len(lens) :])
        backend.init_forward_metadata_replay_cuda_graph(replayed)
        for i, kind in enumerate(kinds):
            q, k, v = inputs(kind, replayed.num_tokens)
            layer = layer_of(config, i)
            cache.write(layer, replayed.slot_mapping, k, v)
            out = backend.forward(q, None, None, layer, captured[len(lens)], save_kv_cache=False)
            torch.testing.assert_close(out.double(), reference(q, layer, replayed, cache)[0], atol=2e-2, rtol=2e-2)
    assert len(fake.plans) == len(fake.made), "replays go past the wrappers' own plan"
    assert len(fake.table_plans) == (2 + 2 + 3) * len(set(kinds))


def test_a_replay_whose_plan_is_laid_out_otherwise_is_refused(fake: FakeFlashInfer) -> None:
    config = config_of(KIND, max_context_len=40)
    backend = FlashInferBackend(config, random_cache(config))
    backend.init_cuda_graph_state(2, 2)
    backend.init_forward_metadata_capture_cuda_graph(batch_of(ForwardMode.DECODE, [1, 1], [6, 7]))
    backend.init_forward_metadata_replay_cuda_graph(batch_of(ForwardMode.DECODE, [1, 1], [16, 27]))
    fake.layout = 64
    with pytest.raises(KernelError, match="otherwise than at capture"):
        backend.init_forward_metadata_replay_cuda_graph(batch_of(ForwardMode.DECODE, [1, 1], [16, 27]))


def test_graphs_of_requests_with_different_numbers_of_tokens_are_refused(fake: FakeFlashInfer) -> None:
    config = config_of(KIND, max_context_len=40)
    backend = FlashInferBackend(config, random_cache(config))
    backend.init_cuda_graph_state(2, 8)
    with pytest.raises(BatchError, match="same number of tokens"):
        backend.init_forward_metadata_capture_cuda_graph(batch_of(ForwardMode.DRAFT_EXTEND, [3, 1], [6, 7]))
    backend.init_forward_metadata_capture_cuda_graph(batch_of(ForwardMode.DRAFT_EXTEND, [2, 2], [6, 7]))
    with pytest.raises(BatchError, match="same number of tokens"):
        backend.init_forward_metadata_replay_cuda_graph(batch_of(ForwardMode.DRAFT_EXTEND, [3, 1], [6, 7]))


def test_masks_of_graphs_are_packed_once_a_window_and_shared_by_batch_sizes(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int | None] = []
    real = graphs.pack
    monkeypatch.setattr(
        graphs, "pack", lambda batch, window, *a, **o: (packed.append(window), real(batch, window, *a, **o))
    )
    config = config_of(KIND, replace(KIND, softcap=3.0), replace(KIND, sliding_window=5), max_context_len=40)
    backend = FlashInferBackend(config, random_cache(config))
    backend.init_cuda_graph_state(4, 24)
    sizes = []
    for b in (1, 3):
        tree = TreeMask.from_parents(torch.tensor(PARENTS[:b]))
        batch = batch_of(ForwardMode.TARGET_VERIFY, [6] * b, [9] * b, tree=tree)
        backend.init_forward_metadata_capture_cuda_graph(batch)
        assert backend._graphs is not None
        sizes.append(backend._graphs.nbytes)
    assert sizes[0] == sizes[1]
    packed.clear()
    backend.init_forward_metadata_replay_cuda_graph(batch)
    assert sorted(packed, key=str) == [5, None]


def test_graph_state_is_sized_by_pages_not_by_tokens(fake: FakeFlashInfer) -> None:
    config = config_of(KIND, page_size=16, max_context_len=131072)
    backend = FlashInferBackend(config, KVCache.allocate(config, num_pages=4))
    backend.init_cuda_graph_state(256, 256)
    assert backend._graphs is not None
    assert backend._graphs.keys.indices.numel() == 256 * 131072 // 16
    assert backend._graphs.nbytes < 64 << 20


def test_graph_limits_are_typed(fake: FakeFlashInfer) -> None:
    config = config_of(KIND, max_context_len=16)
    backend = FlashInferBackend(config, random_cache(config))
    batch = batch_of(*STEPS["decode"])
    with pytest.raises(BatchError, match="init_cuda_graph_state"):
        backend.init_forward_metadata_capture_cuda_graph(batch)
    backend.init_cuda_graph_state(2, 2)
    with pytest.raises(CapacityError, match="graph of 3 requests"):
        backend.init_forward_metadata_capture_cuda_graph(batch)
    with pytest.raises(BatchError, match="was not captured"):
        backend.init_forward_metadata_replay_cuda_graph(batch)
    backend.init_forward_metadata_capture_cuda_graph(batch_of(ForwardMode.DECODE, [1], [9]))
    with pytest.raises(BatchError, match="max_context_len"):
        backend.init_forward_metadata_replay_cuda_graph(batch_of(ForwardMode.DECODE, [1], [40]))


def test_a_batch_without_host_lengths_is_refused(fake: FakeFlashInfer) -> None:
    config = config_of(KIND)
    batch = batch_of(*STEPS["decode"])
    batch.seq_lens_cpu = None
    with pytest.raises(BatchError, match="seq_lens_cpu"):
        FlashInferBackend(config, random_cache(config)).init_forward_metadata(batch)


def test_what_the_library_raises_becomes_a_kernel_error_with_its_cause(fake: FakeFlashInfer) -> None:
    config = config_of(KIND)
    backend, batch = FlashInferBackend(config, random_cache(config)), batch_of(*STEPS["decode"])
    backend.init_forward_metadata(batch)
    fake.fail = ValueError("Failed to allocate memory from the float workspace buffer")
    with pytest.raises(KernelError, match="Failed to allocate") as caught:
        backend.forward(*inputs(KIND, 3), layer_of(config), batch)
    assert caught.value.__cause__ is fake.fail


def test_the_librarys_own_sinks_are_never_used(fake: FakeFlashInfer) -> None:
    check_step(config_of(replace(KIND, sinks=True)), batch_of(*STEPS["decode"]))
    assert all(a["sinks"] is None for _, a in fake.runs)


@pytest.mark.parametrize(
    ("mode", "kind", "kv", "masked", "kernels"),
    [
        (ForwardMode.EXTEND, {}, "auto", False, "fa3"),
        (ForwardMode.MIXED, {}, "auto", False, "fa3"),
        (ForwardMode.EXTEND, {"sliding_window": 9}, "auto", False, "fa2"),
        (ForwardMode.EXTEND, {"softcap": 3.0}, "auto", False, "fa2"),
        (ForwardMode.EXTEND, {}, "fp8_e4m3", False, "fa2"),
        (ForwardMode.EXTEND, {}, "auto", True, "fa2"),
        (ForwardMode.EXTEND, {"qk_head_dim": 64, "v_head_dim": 64}, "auto", False, "fa2"),
        (ForwardMode.TARGET_VERIFY, {}, "auto", False, "fa2"),
        (ForwardMode.DECODE, {}, "auto", False, "fa2"),
    ],
)
def test_fa3_where_it_is_right_and_better(
    monkeypatch: pytest.MonkeyPatch, mode: ForwardMode, kind: dict, kv: str, masked: bool, kernels: str
) -> None:
    monkeypatch.setattr(choice, "compute_capability", lambda device: (9, 0))
    wide = replace(KIND, **{"qk_head_dim": 128, "v_head_dim": 128, **kind})
    config = config_of(wide, kv_cache_dtype=kv)
    batch = batch_of(mode, [1], [5], spans=[[(0, 2)]] if masked else None)
    found = choice.route(choice.LayerShape.of(wide), batch, config, torch.device("cpu"))
    assert found.kernels == kernels
    assert found.masked == masked


def test_warmup_plans_every_way_the_config_can_run(fake: FakeFlashInfer) -> None:
    kinds = (KIND, replace(KIND, sliding_window=9), replace(KIND, cross=True), replace(KIND, ragged=True))
    config = config_of(
        *kinds, bidirectional_spans=True, speculative_num_draft_tokens=3, speculative_eagle_topk=2, page_size=1
    )
    FlashInferBackend(config, random_cache(config)).warmup(config)
    seen = {
        (name, a.get("packed_custom_mask") is not None, a.get("causal"), a["window_left"]) for name, a in fake.plans
    }
    assert ("Decode", False, None, -1) in seen
    assert ("Decode", False, None, 8) in seen
    assert ("Prefill", False, True, -1) in seen
    assert ("Prefill", False, True, 8) in seen
    assert ("Prefill", True, False, -1) in seen
    assert ("Prefill", False, False, -1) in seen
    assert ("Ragged", False, True, -1) in seen
    assert not fake.runs
