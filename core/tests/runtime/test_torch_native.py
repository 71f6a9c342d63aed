"""torch_native against the oracle: every feature, mode, layout and dtype, over a cache full of NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import BatchError, CapacityError, ConfigError
from attn_core.planning.config import LayerKind
from attn_core.runtime.batch import ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.runtime.torch_native.padded import PaddedStep
from attn_core.testing.reference import reference_ragged
from torch import Tensor

from .scenes import GQA3, MLA, Scene, assert_right, native, scene

EXTEND, DECODE, MIXED = ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED
VERIFY, DRAFT_EXTEND = ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND

#: (mode, query lengths, sequence lengths): with and without prefixes, empty requests, one key, page borders.
STEPS: dict[str, tuple[ForwardMode, list[int], list[int]]] = {
    "prefill": (EXTEND, [5, 17, 1, 33], [5, 17, 1, 33]),
    "prefill_one": (EXTEND, [300], [300]),
    "prefix": (EXTEND, [5, 16, 1], [21, 48, 33]),
    "prefix_long": (EXTEND, [280], [300]),
    "empty": (EXTEND, [0, 4, 0], [7, 4, 0]),
    "decode": (DECODE, [1, 1, 1, 1], [1, 16, 17, 40]),
    "decode_long": (DECODE, [1, 1, 1], [700, 3, 129]),
    "mixed": (MIXED, [1, 1, 6, 18], [20, 1, 6, 30]),
    "mixed_without_decodes": (MIXED, [6, 1], [6, 30]),
    "verify": (VERIFY, [4, 4, 4], [4, 20, 50]),
    "draft_extend": (DRAFT_EXTEND, [2, 3, 1], [30, 17, 5]),
    "nobody": (DECODE, [], []),
}

KINDS: dict[str, LayerKind] = {
    "plain": GQA3,
    "window_1": replace(GQA3, sliding_window=1),
    "window_8": replace(GQA3, sliding_window=8),
    "window_wide": replace(GQA3, sliding_window=4096),
    "softcap": replace(GQA3, softcap=2.0),
    "sinks": replace(GQA3, sinks=True),
    "all_at_once": replace(GQA3, sliding_window=20, softcap=3.0, sinks=True, scale=0.3),
    "one_head": replace(GQA3, num_q_heads=1, num_kv_heads=1),
    "large_group": replace(GQA3, num_q_heads=12, num_kv_heads=1),
    "narrow_values": replace(GQA3, v_head_dim=16),
    "odd_width": replace(GQA3, qk_head_dim=20, v_head_dim=20),
    "mla": MLA,
    "mla_window": replace(MLA, sliding_window=8, sinks=True),
    "mla_softcap": replace(MLA, softcap=2.0),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_in_every_mode(kind: str, step: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens)
    result = made.run(native(made), return_lse=True)
    assert_right(result, made.expected())


@pytest.mark.parametrize("kind", ["plain", "all_at_once", "mla"])
@pytest.mark.parametrize("step", ["prefix", "decode", "mixed", "verify"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_every_page_size_and_layout(kind: str, step: str, layout: str, page_size: int) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens, page_size=page_size, layout=layout)
    assert_right(made.run(native(made)), made.expected())


@pytest.mark.parametrize("kind", ["plain", "large_group", "all_at_once", "mla"])
@pytest.mark.parametrize("step", ["prefix", "decode", "mixed", "verify"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
def test_every_dtype_of_queries_and_cache(kind: str, step: str, dtype: str, kv_dtype: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens, dtype=dtype, kv_dtype=kv_dtype)
    result = made.run(native(made), return_lse=True)
    assert result[0].dtype is made.q.dtype
    assert result[1].dtype is torch.float32
    assert_right(result, made.expected())


TREES: dict[str, list[int]] = {
    "chain": [-1, 0, 1, 2, 3],
    "star": [-1, 0, 0, 0, 0],
    "branches": [-1, 0, 0, 1, 2],
    "forest": [-1, -1, 0, 1, 1],
    "dead_branch": [-1, 0, 1, -1, -1],
}


@pytest.mark.parametrize("kind", ["plain", "window_1", "window_8", "all_at_once", "mla_window"])
@pytest.mark.parametrize("tree", TREES)
def test_a_tree_of_drafts_sees_its_ancestors_and_a_window_counts_positions(kind: str, tree: str) -> None:
    mask = TreeMask.from_parents(torch.tensor([TREES[tree], TREES["star"]]))
    made = scene(KINDS[kind], VERIFY, query_lens=[5, 5], seq_lens=[14, 37], tree=mask)
    assert_right(made.run(native(made), return_lse=True), made.expected())


def test_a_chain_tree_is_a_chain() -> None:
    mask = TreeMask.from_parents(torch.tensor([TREES["chain"]] * 2))
    made = scene(GQA3, VERIFY, query_lens=[5, 5], seq_lens=[14, 37])
    without = made.run(native(made))
    made.batch.tree = mask
    torch.testing.assert_close(made.run(native(made)), without)


@pytest.mark.parametrize("kind", ["plain", "window_8", "softcap", "sinks", "mla"])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "spans"),
    [
        ([20, 9], [20, 9], [[(3, 11)], []]),
        ([20, 9], [20, 9], [[(0, 4), (6, 20)], [(2, 9)]]),
        ([10, 9], [20, 40], [[(3, 14)], [(20, 60)]]),
    ],
)
def test_tokens_of_a_span_see_each_other(
    kind: str, query_lens: list[int], seq_lens: list[int], spans: list[list[tuple[int, int]]]
) -> None:
    made = scene(KINDS[kind], EXTEND, query_lens=query_lens, seq_lens=seq_lens, spans=spans)
    result = made.run(native(made))
    assert_right(result, made.expected())
    made.batch.spans = None
    if kind != "window_8":
        assert not torch.allclose(result, made.run(native(made)))


@pytest.mark.parametrize("step", ["prefill", "decode", "mixed", "verify"])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_a_cross_layer_sees_the_encoder(kind: str, step: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    encoder = [30, 5, 0, 16][: len(seq_lens)]
    made = scene(replace(KINDS[kind], cross=True), mode, query_lens=query_lens, seq_lens=seq_lens, encoder_lens=encoder)
    first = made.run(native(made), return_lse=True)
    assert_right(first, made.expected())
    made.k = made.v = None
    later = made.run(native(made))
    assert torch.equal(later, first[0]), "the encoder's keys stay in the cache"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "narrow_values", "one_head"])
def test_ragged_keys(kind: str, causal: bool) -> None:
    layer_kind = replace(KINDS[kind], ragged=True)
    made = scene(KINDS[kind], EXTEND, query_lens=[1], seq_lens=[1])
    queries, keys = [0, 5, 5, 8, 15], [0, 5, 9, 20, 25]
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(15, layer_kind.num_q_heads, layer_kind.qk_head_dim, generator=rng)
    k = torch.randn(25, layer_kind.num_kv_heads, layer_kind.qk_head_dim, generator=rng)
    v = torch.randn(25, layer_kind.num_kv_heads, layer_kind.v_head_dim, generator=rng)
    starts = {"query_start_loc": torch.tensor(queries), "key_start_loc": torch.tensor(keys)}
    out, lse = native(made).forward_ragged(
        q, k, v, made.layer, **starts, max_query_len=7, max_key_len=11, causal=causal, return_lse=True
    )
    wanted, wanted_lse = reference_ragged(q, k, v, made.layer, **starts, causal=causal)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def wide_cache(config: Any, num_pages: int, layout: str) -> KVCache:
    """Keys and values side by side in one tensor, as vLLM keeps them."""
    inner = (16, 2) if layout == "NHD" else (2, 16)
    wide = torch.zeros(num_pages, *inner, 64)
    return KVCache({0: wide[..., :32]}, {0: wide[..., 32:]}, page_size=16, layout=layout)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("step", ["prefix", "decode", "decode_long", "mixed"])
def test_an_engines_strided_cache(step: str, layout: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    cache = wide_cache(None, 80, layout)
    made = scene(GQA3, mode, query_lens=query_lens, seq_lens=seq_lens, layout=layout, cache=cache)
    assert_right(made.run(native(made)), made.expected())


@pytest.mark.parametrize("step", ["prefix", "decode", "mixed", "verify"])
@pytest.mark.parametrize("kind", ["plain", "window_8", "large_group", "mla"])
def test_what_nobody_names_changes_no_bit(kind: str, step: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens)
    poisoned = made.run(native(made), return_lse=True)
    for pool in (made.cache.k(0), made.cache.v(0)):
        if pool is not None:
            pool.nan_to_num_(nan=3.0)
    clean = made.run(native(made), return_lse=True)
    assert torch.equal(poisoned[0], clean[0])
    assert torch.equal(poisoned[1], clean[1])


@pytest.mark.parametrize("step", ["prefix", "decode", "mixed", "verify"])
def test_the_same_batch_gives_the_same_bits(step: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(KINDS["plain"], mode, query_lens=query_lens, seq_lens=seq_lens)
    backend = native(made)
    first = made.run(backend).clone()
    for _ in range(3):
        assert torch.equal(made.run(backend), first)


@pytest.mark.parametrize("step", ["prefix", "decode", "mixed", "verify"])
def test_out_is_filled_and_returned(step: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(GQA3, mode, query_lens=query_lens, seq_lens=seq_lens)
    wanted = made.run(native(made))
    wide = torch.full((wanted.shape[0], 6, 64), float("nan"))
    out = wide[..., :32]
    assert made.run(native(made), out=out) is out
    assert torch.equal(out, wanted)
    assert wide[..., 32:].isnan().all()


def test_keys_written_before_are_read_and_not_written_again() -> None:
    made = scene(GQA3, EXTEND, query_lens=[5], seq_lens=[21])
    backend = native(made)
    backend.write_kv(made.k, made.v, made.layer, made.batch.slot_mapping)
    held = made.cache.k(0).clone()
    made.k = made.v = None
    assert_right(made.run(backend, save_kv_cache=False), made.expected())
    assert torch.equal(made.cache.k(0).nan_to_num(), held.nan_to_num())


@pytest.mark.parametrize("mode", [EXTEND, DECODE])
@pytest.mark.parametrize("length", [0, 1])
def test_a_padded_request_changes_no_other_row(mode: ForwardMode, length: int) -> None:
    made = scene(GQA3, mode, query_lens=[1, 1], seq_lens=[20, 9])
    backend = native(made)
    wanted = made.run(backend).clone()
    batch = made.batch
    batch.seq_lens = torch.cat([batch.seq_lens, torch.tensor([length], dtype=torch.int32)])
    batch.seq_lens_cpu = None
    batch.query_start_loc = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    batch.query_start_loc_cpu = None
    batch.page_table = torch.cat([batch.page_table, torch.zeros_like(batch.page_table[:1])])
    batch.slot_mapping = torch.cat([batch.slot_mapping, torch.tensor([-1])])
    made.q, made.k, made.v = (torch.cat([x, x[:1]]) for x in (made.q, made.k, made.v))
    assert torch.equal(made.run(backend)[:2], wanted)


def test_page_ids_past_the_end_are_never_followed() -> None:
    for mode, query_lens in ((EXTEND, [3, 3]), (DECODE, [1, 1])):
        made = scene(GQA3, mode, query_lens=query_lens, seq_lens=[20, 9])
        backend = native(made)
        wanted = made.run(backend).clone()
        beyond = torch.full((2, 3), 2**31 - 1, dtype=torch.int32)
        made.batch.page_table = torch.cat([made.batch.page_table, beyond], dim=1)
        made.batch.page_table[1, 1] = 2**31 - 1
        assert torch.equal(made.run(backend), wanted)


def test_several_batches_in_flight() -> None:
    first = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[40, 3])
    backend = native(first)
    backend.write_kv(first.k, first.v, first.layer, first.batch.slot_mapping)
    second = replace(first, batch=replace(first.batch, seq_lens=torch.tensor([33, 2], dtype=torch.int32)))
    batches = [first.batch, second.batch]
    for batch in batches:
        backend.init_forward_metadata(batch)
    out = [backend.forward(first.q, None, None, first.layer, b, save_kv_cache=False) for b in batches]
    again = [backend.forward(first.q, None, None, first.layer, b, save_kv_cache=False) for b in reversed(batches)]
    assert torch.equal(out[0], again[1])
    assert torch.equal(out[1], again[0])
    assert not torch.allclose(out[0][0], out[1][0])


def padded(made: Scene, query_len: int) -> tuple[Tensor, Tensor | None]:
    """What accelerators and graphs compute for the step, here on the CPU."""
    backend = native(made)
    backend.write_kv(made.k, made.v, made.layer, made.batch.slot_mapping) if made.k is not None else None
    step = PaddedStep.of(made.batch, query_len, made.cache.page_size)
    return step.attend(made.q, made.layer, made.cache, True)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.sinks])
@pytest.mark.parametrize("step", ["decode", "decode_long", "verify"])
def test_the_fixed_shapes_of_accelerators_compute_the_same(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    if kind == "plain":  # a page table read in several parts
        monkeypatch.setattr("attn_core.runtime.torch_native.padded.CHUNK_ELEMENTS", 1 << 13)
    made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens)
    assert_right(padded(made, query_lens[0]), made.expected())


@pytest.mark.parametrize("window", [None, 2, 8])
def test_the_fixed_shapes_of_accelerators_know_trees(window: int | None) -> None:
    mask = TreeMask.from_parents(torch.tensor([TREES["branches"], TREES["forest"]]))
    kind = replace(GQA3, sliding_window=window)
    made = scene(kind, VERIFY, query_lens=[5, 5], seq_lens=[14, 37], tree=mask)
    assert_right(padded(made, 5), made.expected())


def test_scores_are_held_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.runtime.torch_native.flat.SCORE_ELEMENTS", 4000)
    monkeypatch.setattr("attn_core.runtime.torch_native.flat.GATHER_BYTES", 1)
    monkeypatch.setattr("attn_core.runtime.torch_native.requests.SCORE_ELEMENTS", 4000)
    monkeypatch.setattr("attn_core.runtime.torch_native.requests.MASK_ELEMENTS", 2000)
    for kind in ("plain", "all_at_once", "mla"):
        for step in ("decode_long", "prefix_long", "mixed"):
            mode, query_lens, seq_lens = STEPS[step]
            made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens)
            assert_right(made.run(native(made), return_lse=True), made.expected())


def test_what_a_layer_leaves_behind_does_not_reach_the_next() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[200, 9])
    backend = native(made)
    backend.init_forward_metadata(made.batch)
    poisoned = torch.full_like(made.q, torch.nan)
    assert backend.forward(poisoned, made.k, made.v, made.layer, made.batch).isnan().all()
    assert_right(backend.forward(made.q, made.k, made.v, made.layer, made.batch), made.expected())


MALFORMED = [
    ("a tree in a prefill", EXTEND, {"tree": TreeMask.from_parents(torch.tensor([[-1, 0], [-1, 0]]))}, [2, 2]),
    ("a tree of another size", VERIFY, {"tree": TreeMask.from_parents(torch.tensor([[-1, 0], [-1, 0]]))}, [3, 3]),
]


@pytest.mark.parametrize(("why", "mode", "options", "query_lens"), MALFORMED)
def test_a_tree_that_has_no_meaning_is_refused(
    why: str, mode: ForwardMode, options: dict[str, Any], query_lens: list[int]
) -> None:
    made = scene(GQA3, mode, query_lens=query_lens, seq_lens=[20, 9], **options)
    with pytest.raises(BatchError, match="a tree of 2 draft tokens"):
        made.run(native(made))


def test_rows_that_do_not_fit_the_step_are_refused() -> None:
    made = scene(GQA3, EXTEND, query_lens=[3], seq_lens=[20])
    made.q = made.q[:2]
    with pytest.raises(BatchError, match="q has 2 rows for 3 tokens"):
        made.run(native(made))


def test_keys_that_are_missing_are_refused() -> None:
    made = scene(GQA3, EXTEND, query_lens=[3], seq_lens=[20])
    made.k = made.v = None
    with pytest.raises(BatchError, match="no keys to store"):
        made.run(native(made))


def test_a_cross_layer_without_an_encoder_is_refused() -> None:
    for mode in (EXTEND, DECODE):
        made = scene(GQA3, mode, query_lens=[1], seq_lens=[20])
        made.layer.cross = True
        made.k = made.v = None
        with pytest.raises(BatchError, match="no encoder"):
            made.run(native(made))


def test_a_window_without_positions_is_refused() -> None:
    made = scene(GQA3, EXTEND, query_lens=[1], seq_lens=[1])
    crossing = made.config.replace(layers=(replace(made.config.layers[0], cross=True),))
    object.__setattr__(crossing.layers[0], "sliding_window", 4)  # what a config refuses, a backend must too
    with pytest.raises(ConfigError, match="window"):
        TorchNativeBackend(crossing, made.cache)
    made.layer.sliding_window = 4
    starts = torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="not causal"):
        native(made).forward_ragged(
            made.q, made.k, made.v, made.layer,
            query_start_loc=starts, key_start_loc=starts, max_query_len=1, max_key_len=1, causal=False,
        )  # fmt: skip


def test_idle_steps_give_no_rows() -> None:
    made = scene(GQA3, ForwardMode.IDLE, query_lens=[], seq_lens=[])
    out, lse = made.run(native(made), return_lse=True)
    assert out.shape == (0, 6, 32)
    assert lse.shape == (0, 6)
    made.q = torch.zeros(1, 6, 32)
    with pytest.raises(BatchError, match="IDLE with 1 tokens"):
        made.run(native(made))


# -- graphs: the same code as on CUDA, driven eagerly


def captured(made: Scene) -> TorchNativeBackend:
    backend = native(made)
    backend.init_cuda_graph_state(made.batch.batch_size, made.batch.num_tokens)
    batch = replace(made.batch)
    backend.init_forward_metadata_capture_cuda_graph(batch)
    return backend


@pytest.mark.parametrize("kind", ["plain", "window_8", "sinks", "mla"])
@pytest.mark.parametrize("step", ["decode", "verify"])
def test_a_replay_reads_the_shared_buffers(kind: str, step: str) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(KINDS[kind], mode, query_lens=query_lens, seq_lens=seq_lens)
    backend = captured(made)
    step_state = replace(made.batch)
    backend.init_forward_metadata_capture_cuda_graph(step_state)
    moved = replace(made.batch, page_table=made.batch.page_table.flip(0), seq_lens=made.batch.seq_lens.flip(0))
    moved.slot_mapping = made.batch.slot_mapping.unflatten(0, (len(seq_lens), -1)).flip(0).flatten()
    backend.init_forward_metadata_replay_cuda_graph(moved)
    order = torch.arange(made.q.shape[0]).unflatten(0, (len(seq_lens), -1)).flip(0).flatten()
    # the captured batch object itself, as a graph would run it
    q, k = made.q[order], made.k[order]
    v = None if made.v is None else made.v[order]
    result = backend.forward(q, k, v, made.layer, step_state, return_lse=True)
    expected = made.expected()
    inverse = order.argsort()
    assert_right((result[0][inverse], result[1][inverse]), expected)


def test_a_replay_beyond_what_was_captured_is_refused() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[20, 9])
    backend = captured(made)
    with pytest.raises(CapacityError, match="a sequence of 1000 tokens"):
        backend.init_forward_metadata_replay_cuda_graph(replace(made.batch, max_seq_len=1000))
    with pytest.raises(BatchError, match="no graph of 1 requests"):
        backend.init_forward_metadata_replay_cuda_graph(replace(made.batch, seq_lens=made.batch.seq_lens[:1]))
    spans = torch.zeros(2, 1, 2, dtype=torch.int32)
    with pytest.raises(BatchError, match="with spans"):
        backend.init_forward_metadata_replay_cuda_graph(replace(made.batch, spans=spans))


def test_a_capture_beyond_its_bounds_is_refused() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[20, 9])
    backend = native(made)
    with pytest.raises(ConfigError, match="before its buffers"):
        backend.init_forward_metadata_capture_cuda_graph(made.batch)
    backend.init_cuda_graph_state(1, 1)
    with pytest.raises(CapacityError, match="2 requests and 2 tokens"):
        backend.init_forward_metadata_capture_cuda_graph(made.batch)
