"""vLLM's metadata as batches, its caches as ours, and what was asked for: without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attn_core.engines.vllm.batches import batch_of
from attn_core.engines.vllm.group import wrap
from attn_core.engines.vllm.layers import kinds_of, kv_dtype_name, only, refuse_extras
from attn_core.engines.vllm.planning import blocks_of
from attn_core.engines.vllm.selection import asked_backend
from attn_core.errors import BatchError, ConfigError, UsageError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.discovery import BackendRef, Installed
from attn_core.planning.manifest import Manifest
from attn_core.planning.plan import plan
from attn_core.planning.system import detect
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.layer import AttentionLayer


def common(lens: list[int], seq_lens: list[int], *, padded: int = 0, **fields: Any) -> Any:
    """Metadata of requests with ``lens`` new tokens, and ``padded`` requests more, as vLLM pads a graph's step."""
    requests, tokens = len(lens) + padded, sum(lens) + padded
    starts = torch.zeros(requests + 1, dtype=torch.int32)
    starts[1 : len(lens) + 1] = torch.tensor(lens).cumsum(0)
    starts[len(lens) + 1 :] = sum(lens)
    lengths = torch.tensor(seq_lens + [0] * padded, dtype=torch.int32)
    slots = torch.full((tokens,), -1, dtype=torch.int64)
    slots[: sum(lens)] = torch.arange(16, 16 + sum(lens))
    values = {
        "query_start_loc": starts, "query_start_loc_cpu": starts.clone(), "seq_lens": lengths, "num_reqs": requests,
        "num_actual_tokens": tokens, "max_query_len": max(lens, default=0), "max_seq_len": max(seq_lens, default=0),
        "block_table_tensor": torch.zeros(requests, 4, dtype=torch.int32), "slot_mapping": slots, "causal": True,
        "seq_lens_cpu_upper_bound": lengths.clone(), "is_prefilling": None, "mm_req_doc_ranges": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **fields})


@pytest.mark.parametrize(
    ("lens", "verify", "mode", "decodes"),
    [
        ([1, 1, 1], 0, ForwardMode.DECODE, 0),
        ([5, 3], 0, ForwardMode.EXTEND, 0),
        ([5, 1], 0, ForwardMode.EXTEND, 0),
        ([1, 1, 7], 0, ForwardMode.MIXED, 2),
        ([1, 7, 1], 0, ForwardMode.MIXED, 1),
        ([4, 4], 4, ForwardMode.TARGET_VERIFY, 0),
        ([4, 3], 4, ForwardMode.EXTEND, 0),
        ([1, 4], 4, ForwardMode.MIXED, 1),
        ([1, 1], 4, ForwardMode.DECODE, 0),
        ([], 0, ForwardMode.IDLE, 0),
    ],
)
@pytest.mark.parametrize("padded", [0, 3])
def test_modes(lens: list[int], verify: int, mode: ForwardMode, decodes: int, padded: int) -> None:
    seq_lens = [n + 10 for n in lens]
    batch = batch_of(common(lens, seq_lens, padded=padded), verify_tokens=verify)
    assert (batch.mode, batch.num_decodes) == (mode, decodes)
    assert batch.seq_lens.tolist() == seq_lens
    assert (batch.batch_size, batch.num_tokens) == (len(lens), sum(lens))
    if lens:
        batch.check(page_size=16)


def test_a_prompt_as_long_as_guesses_is_no_verify_step() -> None:
    asked = common([4, 4], [4, 9], is_prefilling=torch.tensor([True, False]))
    assert batch_of(asked, verify_tokens=4).mode is ForwardMode.EXTEND


@pytest.mark.parametrize("causal", [False, torch.tensor([True])])
def test_steps_that_are_not_causal(causal: Any) -> None:
    with pytest.raises(BatchError, match="not causal"):
        batch_of(common([2], [2], causal=causal))


def test_lengths_that_are_only_bounds_are_not_given() -> None:
    assert batch_of(common([1], [9])).seq_lens_cpu is not None
    assert batch_of(common([1], [9]), exact_lengths=False).seq_lens_cpu is None


def test_ranges_hold_their_last_token_and_spans_end_before_it() -> None:
    asked = common([3, 3], [9, 9], mm_req_doc_ranges={1: [(2, 4), (6, 6)], 0: []})
    spans = batch_of(asked, spans=True).spans
    assert spans is not None
    assert spans.tolist() == [[[0, 0], [0, 0]], [[2, 5], [6, 7]]]
    assert batch_of(asked).spans is None
    assert batch_of(common([3], [9], mm_req_doc_ranges={0: []}), spans=True).spans is None


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("packed", [False, True], ids=["layer by layer", "all layers in a block"])
def test_a_cache_is_wrapped_by_strides(layout: str, packed: bool) -> None:
    """Two layers of 5 blocks of 4 tokens, 2 heads, keys of 8 and values of 6: the same memory, read at its place."""
    shape = (5, 2, 2, 4, 14) if packed else (2, 5, 2, 4, 14)
    if layout == "NHD":
        shape = (*shape[:2], shape[3], shape[2], shape[4])
    memory = torch.randn(shape)
    views = [memory[:, i] if packed else memory[i] for i in range(2)]
    caches = {i: view.transpose(1, 2) if layout == "NHD" else view for i, view in enumerate(views)}
    wrapped = wrap(caches, 8, torch.float32)
    assert (wrapped.layout, wrapped.page_size, wrapped.num_pages) == (layout, 4, 5)
    layer = AttentionLayer(1, 2, 2, 8, 6, 1.0)
    wrapped.write(layer, torch.tensor([7, -1]), torch.ones(2, 2, 8), torch.full((2, 2, 6), 2.0))
    assert caches[1][1, :, 3].tolist() == [[1.0] * 8 + [2.0] * 6] * 2
    value = wrapped.v(1)
    assert value is not None
    assert wrapped.k(1).data_ptr() == caches[1].data_ptr()
    assert value.data_ptr() == caches[1].data_ptr() + 8 * 4


def test_a_latent_cache_and_one_of_bytes() -> None:
    latent = wrap({3: torch.zeros(5, 4, 20)}, 20, torch.float32)
    assert (latent.layout, latent.layer_ids, latent.v(3)) == ("MLA", (3,), None)
    stored = wrap({0: torch.zeros(5, 4, 2, 16, dtype=torch.uint8).transpose(1, 2)}, 8, torch.float8_e4m3fn)
    assert (stored.dtype, stored.layout) == (torch.float8_e4m3fn, "NHD")


def test_layers_of_one_kind_share_it() -> None:
    narrow, wide = LayerKind(4, 2, 32, 32, sliding_window=8), LayerKind(4, 2, 32, 32)
    layers = [
        SimpleNamespace(impl=SimpleNamespace(kind_of=lambda _, kind=kind: kind)) for kind in (narrow, wide, narrow)
    ]
    kinds = kinds_of(layers)
    assert [(kind.sliding_window, kind.layer_ids) for kind in kinds] == [(8, (0, 2)), (None, (1,))]
    assert [kind.layer_ids for kind in only(kinds, frozenset({2}))] == [(2,)]


@pytest.mark.parametrize(
    ("cache", "dtype", "name"),
    [
        ("auto", torch.float32, "auto"),
        (None, torch.float16, "auto"),
        ("bfloat16", torch.bfloat16, "auto"),
        ("fp8", torch.bfloat16, "fp8_e4m3"),
        ("fp8_e5m2", torch.float32, "fp8_e5m2"),
    ],
)
def test_cache_dtypes(cache: str | None, dtype: torch.dtype, name: str) -> None:
    assert kv_dtype_name(cache, dtype) == name


def test_cache_dtypes_that_the_contract_has_not() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype bfloat16 in a model of float32"):
        kv_dtype_name("bfloat16", torch.float32)


def test_arguments_of_a_layer_that_say_nothing() -> None:
    refuse_extras({"use_alibi_sqrt": False, "chunk_lookback": -1, "alibi_slopes": None})
    with pytest.raises(ConfigError, match=r"chunk_lookback=0, mystery=\[1\]"):
        refuse_extras({"chunk_lookback": 0, "mystery": [1]})


@pytest.mark.parametrize(
    ("option", "variable", "asked"),
    [
        ({}, {}, "auto"),
        ({}, {"ATTN_BACKEND": " fa3 "}, "fa3"),
        ({"attn_backend": "triton"}, {"ATTN_BACKEND": "fa3"}, "triton"),
        ({"theirs": 1}, {"ATTN_BACKEND": "prefill=fa3,decode=flashinfer"}, "prefill=fa3,decode=flashinfer"),
        (None, {}, "auto"),
    ],
)
def test_who_is_asked_for(option: Any, variable: dict[str, str], asked: str) -> None:
    assert asked_backend(option, variable) == asked


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"attn_backed": "x"}, "did you mean 'attn_backend'"),
        ({"attn_backend": 3}, "3"),
        ({"attn_backend": "a=b"}, "'a'"),
    ],
)
def test_malformed_requests(option: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        asked_backend(option, {})


CLAUSE = """
schema = 1
name = "{name}"
protocol = ">=1.0,<2"
summary = "test"
[[supports]]
phases = {phases}
device = "cpu"
kind = "mha"
dtypes = ["float32"]
head_dims = "any"
page_sizes = {pages}
kv_layouts = {layouts}
"""


@pytest.mark.parametrize(
    ("first", "second", "sizes", "multiple", "layouts"),
    [
        (('"any"', '["NHD", "HND"]'), ('"any"', '["NHD", "HND"]'), None, 1, ("NHD", "HND")),
        (("{ multiple_of = 16 }", '["HND"]'), ('"any"', '["NHD", "HND"]'), None, 16, ("HND",)),
        (("[16, 32, 64]", '["NHD"]'), ("[32, 64, 128]", '["NHD"]'), (32, 64), None, ("NHD",)),
        (("[1]", '["NHD"]'), ("[64]", '["NHD"]'), None, 64, ("NHD",)),
    ],
    ids=["any", "multiples", "what both have", "nothing in common: rewritten"],
)
def test_blocks_that_a_plan_can_use(
    first: tuple[str, str],
    second: tuple[str, str],
    sizes: tuple[int, ...] | None,
    multiple: int | None,
    layouts: tuple[str, ...],
) -> None:
    texts = {
        name: CLAUSE.format(name=name, phases=f'["{phase}"]', pages=pages, layouts=names)
        for name, phase, (pages, names) in (("one", "prefill", first), ("two", "decode", second))
    }
    refs = tuple(BackendRef(name, "test", "1", "x:Y", Manifest.parse(text), name) for name, text in texts.items())
    config = AttentionConfig(layers=(LayerKind(4, 2, 32, 32),), dtype="float32")
    made = plan(config, {"prefill": "one", "decode": "two"}, system=detect("cpu"), installed=Installed(refs))
    blocks = blocks_of(made)
    assert sizes is None or blocks.sizes == sizes
    assert (blocks.multiple, blocks.layouts) == (multiple, layouts)
