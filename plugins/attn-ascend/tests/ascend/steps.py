"""Steps for tests: a cache with a history in shuffled pages, a batch over it, and the oracle's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Expected, Precision, expect
from torch import Tensor

PAGE = 128


@dataclass
class Scene:
    """One layer, its cache filled with a history, a batch, and the new tokens' q, k, v."""

    config: AttentionConfig
    layer: AttentionLayer
    cache: KVCache
    batch: ForwardBatch
    q: Tensor
    k: Tensor
    v: Tensor | None

    def expected(self) -> Expected:
        """The oracle's answer; a forward must have written k and v."""
        precision = Precision.of(self.q.dtype)
        return expect(problems(self.q, self.layer, self.batch, self.cache), self.q, self.layer, precision)


def kind_of(heads: int, kv_heads: int, width: int, *, v_width: int | None = None, **maths: object) -> LayerKind:
    """An MHA layer kind."""
    return LayerKind(heads, kv_heads, width, v_width or width, **maths)  # type: ignore[arg-type]


def mla_kind(heads: int) -> LayerKind:
    """DeepSeek's absorbed layer."""
    return LayerKind(heads, 1, 576, 512, kind="mla", scale=192**-0.5)


def scene(
    kind: LayerKind,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    mode: ForwardMode = ForwardMode.EXTEND,
    dtype: torch.dtype = torch.float16,
    sink_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **batch: object,
) -> Scene:
    """A step of these lengths; pages nobody names and the tails of last pages hold NaN."""
    torch.manual_seed(seed)
    counts = [-(-n // PAGE) for n in seq_lens]
    config = AttentionConfig(
        (kind,),
        dtype=str(dtype).removeprefix("torch."),
        page_size=PAGE,
        kv_layout="MLA" if kind.kind == "mla" else "NHD",
    )
    cache = KVCache.allocate(config, num_pages=sum(counts) + 3)
    cache.k(0).fill_(float("nan"))
    values = cache.v(0)
    if values is not None:
        values.fill_(float("nan"))
    order = (torch.randperm(sum(counts) + 2) + 1).tolist()
    pages = [[order.pop() for _ in range(count)] for count in counts]
    sinks = torch.randn(kind.num_q_heads).to(sink_dtype) if kind.sinks else None
    layer = AttentionLayer.of_kind(kind, 0, sinks=sinks)
    history = ForwardBatch.build(
        ForwardMode.EXTEND, query_lens=seq_lens, seq_lens=seq_lens, pages=pages, page_size=PAGE
    )
    total = history.num_tokens
    keys = torch.randn(total, kind.num_kv_heads, kind.qk_head_dim).to(dtype)
    cache.write(
        layer,
        history.slot_mapping,
        keys,
        None if values is None else torch.randn(total, kind.num_kv_heads, kind.v_head_dim).to(dtype),
    )
    step = ForwardBatch.build(mode, query_lens=query_lens, seq_lens=seq_lens, pages=pages, page_size=PAGE, **batch)  # type: ignore[arg-type]
    new = step.num_tokens
    q = torch.randn(new, kind.num_q_heads, kind.qk_head_dim).to(dtype)
    k = torch.randn(new, kind.num_kv_heads, kind.qk_head_dim).to(dtype)
    v = None if values is None else torch.randn(new, kind.num_kv_heads, kind.v_head_dim).to(dtype)
    return Scene(config, layer, cache, step, q, k, v)


def assert_close(out: Tensor, expected: Expected, lse: Tensor | None = None) -> None:
    """Within the kit's tolerances, row by row and value by value."""
    error = (out.double() - expected.out).abs()
    assert bool((error <= expected.value).all()), (
        f"worst value error {float((error / expected.value).max()):.2f} tolerances"
    )
    row = error.square().mean(-1).sqrt()
    assert bool((row <= expected.row).all()), f"worst row error {float((row / expected.row).max()):.2f} tolerances"
    if lse is not None:
        both = expected.lse.isfinite() & lse.isfinite()
        assert torch.equal(expected.lse.isfinite(), lse.isfinite())
        off = (lse.double() - expected.lse).abs()[both]
        assert bool((off <= expected.lse_value[both]).all()), f"LSE off by {float(off.max()):.2e}"
