"""Level `fake-device`: the backend unmodified on `npu:0`, through the vendor's own streams, events and NPUGraph.

The card is host memory (acl.c): operators are the emulator's, and the replay of a graph does nothing, so that what is
proved is the order of calls and where their arguments lie, and not what a graph computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from attn_ascend.backend import AscendBackend
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Expected, Precision, expect
from host_memory import HostMemory, host, install_kernels
from torch import Tensor

PAGE = 128
MHA = LayerKind(8, 2, 128, 128)
WINDOW = LayerKind(8, 2, 64, 64, sliding_window=9)
MLA = LayerKind(4, 1, 576, 512, kind="mla", scale=192**-0.5)
DECODE, VERIFY, EXTEND = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND


@pytest.fixture(autouse=True, scope="module")
def card() -> Iterator[None]:
    install_kernels()
    with HostMemory():
        yield


def journal() -> list[str]:
    """What the vendor's code asked of AscendCL since the last look: captures, groups, updates, events, replays."""
    acl = ctypes.CDLL("libascendcl.so")
    acl.fake_journal.restype = ctypes.c_char_p
    text = acl.fake_journal().decode()
    acl.fake_journal_clear()
    return [line for line in text.split(";") if line]


class OnCard:
    """One layer on the card, its cache filled, and steps over it."""

    def __init__(self, kind: LayerKind, lengths: list[int]) -> None:
        torch.manual_seed(0)
        layout = "MLA" if kind.kind == "mla" else "NHD"
        self.config = AttentionConfig((kind,), dtype="float16", page_size=PAGE, kv_layout=layout)
        self.layer = AttentionLayer.of_kind(kind, 0)
        self.cache = KVCache.allocate(self.config, num_pages=16, device="npu")
        for pool in (self.cache.k(0), self.cache.v(0)):
            if pool is not None:
                host(pool).copy_(torch.randn(pool.shape).half())
        self.pages = [[1 + 3 * b + i for i in range(3)] for b in range(len(lengths))]

    def step(self, mode: ForwardMode, query_lens: list[int], seq_lens: list[int]) -> ForwardBatch:
        return ForwardBatch.build(
            mode, query_lens=query_lens, seq_lens=seq_lens, pages=self.pages, page_size=PAGE, device="npu"
        )

    def tensors(self, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        q = torch.randn(tokens, self.layer.num_q_heads, self.layer.qk_head_dim).half().to("npu")
        k = torch.randn(tokens, self.layer.num_kv_heads, self.layer.qk_head_dim).half().to("npu")
        return q, k, None if self.layer.kind == "mla" else torch.randn(k.shape).half().to("npu")

    def expected(self, q: Tensor, batch: ForwardBatch) -> Expected:
        """The oracle over the card's bytes."""
        values = self.cache.v(0)
        cache = KVCache({0: host(self.cache.k(0))}, {0: None if values is None else host(values)}, page_size=PAGE,
                        layout=self.cache.layout)  # fmt: skip
        there = ForwardBatch(
            mode=batch.mode, seq_lens=host(batch.seq_lens), query_start_loc=host(batch.query_start_loc),
            page_table=host(batch.page_table), slot_mapping=host(batch.slot_mapping),
            max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len,
        )  # fmt: skip
        own = host(q)
        return expect(problems(own, self.layer, there, cache), own, self.layer, Precision.of(torch.float16))


def assert_close(out: Tensor, expected: Expected) -> None:
    error = (host(out).double() - expected.out).abs()
    assert bool((error <= expected.value).all())


def test_torch_npu_takes_the_stub_for_a_card() -> None:
    assert torch.npu.is_available()
    moved = torch.arange(6, dtype=torch.int32).to("npu")
    assert (moved.device.type, moved.cpu().tolist()) == ("npu", [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("kind", "mode", "query_lens", "seq_lens"),
    [
        (MHA, EXTEND, [5, 1], [140, 1]),
        (MHA, DECODE, [1, 1], [140, 300]),
        (WINDOW, EXTEND, [5, 1], [140, 30]),
        (WINDOW, DECODE, [1, 1], [140, 300]),
        (MLA, DECODE, [1, 1], [140, 300]),
        (MLA, VERIFY, [4, 4], [140, 300]),
        (MLA, EXTEND, [20, 3], [140, 3]),
    ],
)
def test_eager_steps_run_on_the_card(
    kind: LayerKind, mode: ForwardMode, query_lens: list[int], seq_lens: list[int]
) -> None:
    there = OnCard(kind, seq_lens)
    batch = there.step(mode, query_lens, seq_lens)
    q, k, v = there.tensors(batch.num_tokens)
    backend = AscendBackend(there.config, there.cache)
    backend.init_forward_metadata(batch)
    out = backend.forward(q, k, v, there.layer, batch)
    assert isinstance(out, Tensor)
    assert out.device.type == "npu"
    assert_close(out, there.expected(q, batch))


@pytest.mark.parametrize(("mode", "query_len"), [(DECODE, 1), (VERIFY, 4)], ids=["decode", "verify"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_graph_is_captured_renewed_and_replayed_through_the_vendors_code(
    mode: ForwardMode, query_len: int, layers: int
) -> None:
    there = OnCard(MHA, [140, 300])
    batch = there.step(mode, [query_len] * 2, [140, 300])
    q, k, v = there.tensors(batch.num_tokens)
    backend = AscendBackend(there.config, there.cache)
    backend.init_cuda_graph_state(4, 16)
    backend.init_forward_metadata_capture_cuda_graph(batch)
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    journal()
    with torch.npu.graph(graph, stream=stream):
        for _ in range(layers):
            out = backend.forward(q, k, v, there.layer, batch)
    captured = journal()
    assert captured[0] == "capture_begin"
    assert captured[-1] == "capture_end"
    assert _tasks(captured) == ["wait", "reset", "group_begin", "group_end"] * layers
    assert isinstance(out, Tensor)
    pointer = out.data_ptr()

    step = there.step(mode, [query_len] * 2, [133, 131])
    backend.init_forward_metadata_replay_cuda_graph(step)
    renewed = journal()
    assert _tasks(renewed)[-3 * layers :] == ["update_begin", "update_end", "record"] * layers
    graph.replay()
    torch.npu.synchronize()
    assert "replay" in journal()
    assert out.data_ptr() == pointer
    assert_close(out, there.expected(q, step))


def test_a_graph_keeps_its_buffers_over_many_replays() -> None:
    there = OnCard(MHA, [140, 300])
    batch = there.step(DECODE, [1, 1], [140, 300])
    q, k, v = there.tensors(2)
    backend = AscendBackend(there.config, there.cache)
    backend.init_cuda_graph_state(4, 16)
    backend.init_forward_metadata_capture_cuda_graph(batch)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, stream=torch.npu.Stream()):
        out = backend.forward(q, k, v, there.layer, batch)
    table = batch.plan_state.table.data_ptr()
    for length in (129, 255, 256, 257, 384):
        step = there.step(DECODE, [1, 1], [length, 130])
        backend.init_forward_metadata_replay_cuda_graph(step)
        graph.replay()
        assert step.plan_state.table.data_ptr() == table
        assert isinstance(out, Tensor)
        assert_close(out, there.expected(q, step))


def _tasks(lines: list[str]) -> list[str]:
    """The lines of task groups and events, without the start and the end of the capture."""
    return [line for line in lines if not line.startswith("capture")]
