"""One layer on the fake card and steps over it, what its AscendCL was asked for, and the comparison with the oracle."""

from __future__ import annotations

import ctypes

import torch
from attn_ascend.backend import AscendBackend
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Expected, Precision, expect
from host_memory import host
from torch import Tensor

PAGE = 128
MHA = LayerKind(8, 2, 128, 128)
WINDOW = LayerKind(8, 2, 64, 64, sliding_window=9)
MLA = LayerKind(4, 1, 576, 512, kind="mla", scale=192**-0.5)


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
        """The oracle's answer, computed on the host."""
        return expect(problems(q, self.layer, batch, self.cache), q, self.layer, Precision.of(torch.float16))


class Captured:
    """A step of a scene as a graph of ``layers`` forwards, captured by the vendor's NPUGraph."""

    def __init__(self, there: OnCard, mode: ForwardMode, query_lens: list[int], *, layers: int = 1) -> None:
        self.there, self.mode, self.query_lens = there, mode, query_lens
        batch = there.step(mode, query_lens, [140, 300])
        self.q, self.k, self.v = there.tensors(batch.num_tokens)
        self.backend = AscendBackend(there.config, there.cache)
        self.backend.init_cuda_graph_state(4, 16)
        self.backend.init_forward_metadata_capture_cuda_graph(batch)
        self.state = batch.plan_state
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph, stream=torch.npu.Stream()):
            for _ in range(layers):
                self.out = self.backend.forward(self.q, self.k, self.v, there.layer, batch)

    def renewed(self, seq_lens: list[int]) -> ForwardBatch:
        """The step of these lengths, ready to be replayed."""
        step = self.there.step(self.mode, self.query_lens, seq_lens)
        self.backend.init_forward_metadata_replay_cuda_graph(step)
        return step

    def replay(self, seq_lens: list[int]) -> ForwardBatch:
        step = self.renewed(seq_lens)
        self.graph.replay()
        torch.npu.synchronize()
        return step

    def expected(self, step: ForwardBatch) -> Expected:
        return self.there.expected(self.q, step)


def assert_close(out: Tensor, expected: Expected) -> None:
    error = (host(out).double() - expected.out).abs()
    assert bool((error <= expected.value).all())
