"""Capture and replay: padding, growth, pointers that stay, and what is refused; eagerly where there is no CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import AttnError, BackendRefusedError, BatchError, CapacityError, ConfigError
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.build import build
from attn_core.runtime.graph_batch import GraphShape
from attn_core.runtime.graphs import GraphRunner
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from torch import Tensor

from .scenes import GQA3, Scene, assert_right, native, planned, ref, scene

DECODE, VERIFY = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY


class Ungraphed(AttentionBackend):
    """A backend with the two forwards and nothing more."""

    name = "ungraphed"

    def init_forward_metadata(self, batch: ForwardBatch) -> None: ...
    def forward_extend(self, q: Tensor, k: Any, v: Any, layer: Any, batch: Any, **options: Any) -> Tensor:
        return q

    def forward_decode(self, q: Tensor, k: Any, v: Any, layer: Any, batch: Any, **options: Any) -> Tensor:
        return q


class FillsWithOne(TorchNativeBackend):
    cuda_graph_seq_len_fill_value = 1


def runner(
    made: Scene, backend: AttentionBackend, sizes: list[int], shape: GraphShape | None = None
) -> tuple[GraphRunner, list[ForwardBatch]]:
    """A runner of one layer, captured; and the batches that its step was called with."""
    seen: list[ForwardBatch] = []

    def step(inputs: Mapping[str, Tensor], batch: ForwardBatch) -> tuple[Tensor, ...]:
        seen.append(batch)
        result = backend.forward(inputs["q"], inputs["k"], inputs["v"], made.layer, batch, return_lse=True)
        assert isinstance(result, tuple)
        return result

    made_runner = GraphRunner(backend, step, shape or GraphShape(DECODE, max_seq_len=64), batch_sizes=sizes)
    made_runner.capture({"q": made.q, "k": made.k, "v": made.v})  # type: ignore[dict-item]
    return made_runner, seen


def inputs(made: Scene) -> dict[str, Tensor]:
    assert made.v is not None
    return {"q": made.q, "k": made.k, "v": made.v}


@pytest.mark.parametrize("cls", [TorchNativeBackend, FillsWithOne])
@pytest.mark.parametrize("requests", [1, 2, 3, 4])
def test_a_smaller_batch_is_padded_and_right(cls: type[TorchNativeBackend], requests: int) -> None:
    made = scene(GQA3, DECODE, query_lens=[1] * requests, seq_lens=[33, 1, 17, 40][:requests])
    graphs, seen = runner(made, cls(made.config, made.cache), [4, 2])
    result = graphs.replay(made.batch, inputs(made))
    assert_right(result, made.expected())
    size = 2 if requests <= 2 else 4
    padded = seen[-1]
    assert padded.batch_size == size
    assert padded.seq_lens[requests:].tolist() == [cls.cuda_graph_seq_len_fill_value] * (size - requests)
    assert padded.slot_mapping[requests:].tolist() == [-1] * (size - requests)
    assert not padded.page_table[requests:].any()


def test_padding_writes_nothing() -> None:
    made = scene(GQA3, DECODE, query_lens=[1], seq_lens=[33])
    graphs, _ = runner(made, native(made), [4])
    before = made.cache.k(0).clone()
    graphs.replay(made.batch, inputs(made))
    changed = (made.cache.k(0).view(torch.int32) != before.view(torch.int32)).any(-1).any(-1)
    assert changed.flatten().nonzero().flatten().tolist() == made.batch.slot_mapping.tolist()


def test_a_replay_after_growth_and_after_a_larger_batch() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1, 1], seq_lens=[33, 5, 60])
    graphs, _ = runner(made, native(made), [4])
    graphs.replay(made.batch, inputs(made))
    for requests in (1, 2, 3):
        fewer = scene(
            GQA3, DECODE, query_lens=[1] * requests, seq_lens=[34, 49, 2][:requests], cache=made.cache, seed=requests
        )
        fewer.layer = made.layer
        assert_right(graphs.replay(fewer.batch, inputs(fewer)), fewer.expected())


def test_pointers_stay_where_they_are() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[33, 5])
    graphs, seen = runner(made, native(made), [2])

    def pointers() -> list[int]:
        batch = seen[-1]
        return [x.data_ptr() for x in (batch.seq_lens, batch.page_table, batch.slot_mapping, batch.query_start_loc)]

    first = [out.data_ptr() for out in graphs.replay(made.batch, inputs(made))]
    kept = pointers()
    assert [out.data_ptr() for out in graphs.replay(made.batch, inputs(made))] == first
    assert pointers() == kept


@pytest.mark.parametrize("tree", [False, True])
def test_verify_with_a_fixed_number_of_drafts(tree: bool) -> None:
    mask = TreeMask.from_parents(torch.tensor([[-1, 0, 0, 1]] * 3)) if tree else None
    made = scene(GQA3, VERIFY, query_lens=[4, 4, 4], seq_lens=[4, 20, 50], tree=mask)
    shape = GraphShape(VERIFY, max_seq_len=64, query_len=4, tree=tree)
    graphs, seen = runner(made, native(made), [5], shape)
    assert_right(graphs.replay(made.batch, inputs(made)), made.expected())
    if tree:
        assert seen[-1].tree is not None
        assert torch.equal(seen[-1].tree.visible[3], torch.eye(4, dtype=torch.bool)), "padding sees itself"


def test_cross_layers_replay_over_their_encoder() -> None:
    made = scene(
        replace(GQA3, cross=True), DECODE, query_lens=[1, 1], seq_lens=[9, 3], encoder_lens=[30, 5]
    )  # fmt: skip
    backend = native(made)
    made.run(backend)
    made.batch.encoder_slot_mapping = None
    layer = made.layer

    def step(given: Mapping[str, Tensor], batch: ForwardBatch) -> tuple[Tensor, ...]:
        out = backend.forward(given["q"], None, None, layer, batch)
        assert isinstance(out, Tensor)
        return (out,)

    shape = GraphShape(DECODE, max_seq_len=64, max_encoder_seq_len=48)
    graphs = GraphRunner(backend, step, shape, batch_sizes=[3])
    graphs.capture({"q": made.q})
    assert_right(graphs.replay(made.batch, {"q": made.q})[0], made.expected())


def test_host_lengths_are_there_only_if_the_batch_has_them() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[33, 5])
    graphs, seen = runner(made, native(made), [3])
    graphs.replay(made.batch, inputs(made))
    assert seen[-1].seq_lens_cpu is not None
    assert seen[-1].seq_lens_cpu.tolist() == [33, 5, 0]
    graphs.replay(replace(made.batch, seq_lens_cpu=None), inputs(made))
    assert seen[-1].seq_lens_cpu is None


def test_a_router_replays_the_backend_of_the_mode() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[33, 5])
    features = ["lse", "cuda_graph", "verify_chain"]
    refs = ref("one", TorchNativeBackend, features=features), ref("two", FillsWithOne, features=features)
    config = made.config.replace(lse=True, cuda_graph=True)
    router = build(planned(config, *refs, backend={"prefill": "one", "decode": "two"}), made.cache)
    graphs, seen = runner(made, router, [4])
    assert_right(graphs.replay(made.batch, inputs(made)), made.expected())
    assert seen[-1].seq_lens.tolist() == [33, 5, 1, 1]


# -- what is refused


def test_a_backend_without_graphs_is_refused() -> None:
    made = scene(GQA3, DECODE, query_lens=[1], seq_lens=[9])
    with pytest.raises(BackendRefusedError, match="ungraphed cannot capture DECODE: ungraphed has no CUDA graphs"):
        runner(made, Ungraphed(made.config, made.cache), [1])


def test_a_plan_without_graphs_is_refused() -> None:
    made = scene(GQA3, DECODE, query_lens=[1], seq_lens=[9])
    router = build(planned(made.config.replace(lse=True), ref("one", TorchNativeBackend)), made.cache)
    with pytest.raises(BackendRefusedError, match="graphs were not planned"):
        runner(made, router, [1])


@pytest.mark.parametrize("sizes", [[], [0, 2], [-1]])
def test_sizes_that_are_none_are_refused(sizes: list[int]) -> None:
    made = scene(GQA3, DECODE, query_lens=[1], seq_lens=[9])
    with pytest.raises(ConfigError, match="batch sizes"):
        runner(made, native(made), sizes)


@pytest.mark.parametrize(
    "shape",
    [
        {"mode": ForwardMode.EXTEND},
        {"mode": DECODE, "query_len": 2},
        {"mode": VERIFY, "query_len": 0},
        {"mode": DECODE, "tree": True},
        {"mode": DECODE, "max_seq_len": 0},
    ],
)
def test_shapes_that_cannot_be_captured_are_refused(shape: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GraphShape(**{"max_seq_len": 64, **shape})


OTHER: list[tuple[str, dict[str, Any], type[AttnError], str]] = [
    ("mode", {"mode": VERIFY}, BatchError, "mode TARGET_VERIFY, captured DECODE"),
    ("length", {"max_seq_len": 65}, CapacityError, "a sequence of 65 tokens"),
    ("tokens", {"slot_mapping": torch.zeros(3, dtype=torch.int64)}, BatchError, "3 tokens for 2 requests"),
    ("tree", {"tree": TreeMask.from_parents(torch.tensor([[-1], [-1]]))}, BatchError, "a tree"),
    ("spans", {"spans": torch.zeros(2, 1, 2, dtype=torch.int32)}, BatchError, "spans"),
    ("encoder", {"encoder_seq_lens": torch.zeros(2, dtype=torch.int32)}, BatchError, "an encoder"),
    ("encoder writes", {"encoder_slot_mapping": torch.zeros(2, dtype=torch.int64)}, BatchError, "encoder tokens"),
]


@pytest.mark.parametrize(("why", "changes", "error", "message"), OTHER, ids=[row[0] for row in OTHER])
def test_a_batch_of_another_form_is_refused(
    why: str, changes: dict[str, Any], error: type[AttnError], message: str
) -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1], seq_lens=[33, 5])
    graphs, _ = runner(made, native(made), [2])
    with pytest.raises(error, match=message):
        graphs.replay(replace(made.batch, **changes), inputs(made))


def test_more_requests_than_captured_are_refused() -> None:
    made = scene(GQA3, DECODE, query_lens=[1, 1, 1], seq_lens=[33, 5, 2])
    graphs, _ = runner(made, native(made), [1, 2])
    with pytest.raises(CapacityError, match="3 requests in a replay") as caught:
        graphs.replay(made.batch, inputs(made))
    assert "up to 2" in str(caught.value)


def test_other_inputs_and_a_replay_before_the_capture_are_refused() -> None:
    made = scene(GQA3, DECODE, query_lens=[1], seq_lens=[9])
    graphs, _ = runner(made, native(made), [1])
    with pytest.raises(BatchError, match=r"a replay with inputs \['q'\]"):
        graphs.replay(made.batch, {"q": made.q})
    fewer = {name: value[:0] for name, value in inputs(made).items()}
    with pytest.raises(BatchError, match="a replay with 0 rows of q"):  # those of an earlier replay would be taken
        graphs.replay(made.batch, fewer)
    early = GraphRunner(native(made), lambda given, batch: (), GraphShape(DECODE, 64), batch_sizes=[1])
    with pytest.raises(CapacityError, match="1 requests in a replay"):
        early.replay(made.batch, {})


def on_cuda(made: Scene) -> Scene:
    """The same step and cache on the GPU."""
    assert made.v is not None
    names = ("seq_lens", "query_start_loc", "page_table", "slot_mapping")
    batch = replace(made.batch, **{name: getattr(made.batch, name).cuda() for name in names})
    cache = KVCache({0: made.cache.k(0).cuda()}, {0: made.cache.v_nhd(0).cuda()}, page_size=16, layout="NHD")
    return replace(made, cache=cache, batch=batch, q=made.q.cuda(), k=made.k.cuda(), v=made.v.cuda())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("requests", [1, 3])
def test_a_cuda_graph_replays_without_host_or_allocator(requests: int) -> None:
    made = scene(GQA3, DECODE, query_lens=[1] * requests, seq_lens=[33, 5, 60][:requests])
    moved = on_cuda(made)
    made.run(native(made))
    graphs, _ = runner(moved, native(moved), [1, 4])
    graphs.replay(moved.batch, inputs(moved))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = graphs.replay(moved.batch, inputs(moved))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_right(tuple(out.cpu() for out in result), made.expected())
