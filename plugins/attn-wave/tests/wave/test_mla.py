"""Absorbed MLA at DeepSeek-V3's widths, in numbers: values are read where the latent rows lie, in every kind of step.

The expanded form, keys of 192 and values of 128 that are given, in chunks that are joined by their log-sum-exp.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_wave import runtime
from attn_wave.backend import WaveBackend
from attn_wave.emulator.device import Gfx942
from torch import Tensor
from torch.overrides import TorchFunctionMode

LATENT, ROPE, PAGE, SCALE = 512, 64, 64, (128 + 64) ** -0.5
#: Outputs of at most about 4 in bf16, of probabilities that are rounded to bf16 too; log-sum-exps are all fp32.
CLOSE, CLOSE_LSE = 2e-2, 1e-5


def made(heads: int, **more: Any) -> tuple[WaveBackend, AttentionLayer, KVCache]:
    """A backend over a latent pool of random rows."""
    kind = LayerKind(heads, 1, LATENT + ROPE, LATENT, kind="mla", layer_ids=(0,), scale=SCALE)
    config = AttentionConfig(layers=(kind,), dtype="bfloat16", page_size=PAGE, kv_layout="MLA", **more)
    cache = KVCache.allocate(config, num_pages=24)
    cache.k(0).normal_(generator=torch.Generator().manual_seed(7))
    return WaveBackend(config, cache), AttentionLayer.of_kind(kind, 0), cache


def batch_of(mode: ForwardMode, queries: list[int], keys: list[int], tree: TreeMask | None = None) -> ForwardBatch:
    """Pages in an order that no copy of the pool would have."""
    pages, free = [], iter(reversed(range(1, 24)))
    for n in keys:
        pages.append([next(free) for _ in range(-(-n // PAGE))])
    return ForwardBatch.build(mode, query_lens=queries, seq_lens=keys, pages=pages, page_size=PAGE, tree=tree)


def exact(q: Tensor, batch: ForwardBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """fp64, over the rows as they lie in the cache after the step."""
    outs, lses = [], []
    pool = cache.k(0).double()
    for b, (first, last) in enumerate(pairwise(batch.query_start_loc.tolist())):
        n = int(batch.seq_lens[b])
        rows = pool[batch.page_table[b, : -(-n // PAGE)].long()].flatten(0, 1)[:n]
        scores = torch.einsum("qhd,kd->hqk", q[first:last].double(), rows) * SCALE
        position = torch.arange(n - (last - first), n)
        hidden = torch.arange(n) > position[:, None]
        if batch.tree is not None:
            hidden[:, n - (last - first) :] = ~batch.tree.visible[b]
        scores.masked_fill_(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,kd->qhd", scores.softmax(-1), rows[:, :LATENT]))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


class Largest(TorchFunctionMode):
    """The most elements of any tensor of the pool's type that an operation of torch makes, views of the pool aside."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self.pool, self.elements = pool, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, Tensor) or tensor.dtype != self.pool.dtype:
                continue
            if tensor.untyped_storage().data_ptr() != self.pool.data_ptr():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What kernels are given: those of the first phase, then the one of the second."""
    seen: list[dict[str, Tensor]] = []
    right = runtime.Kernel.launch

    def noted(kernel: runtime.Kernel, tensors: dict[str, Tensor], *rest: Any) -> None:
        seen.append(dict(tensors))
        right(kernel, tensors, *rest)

    monkeypatch.setattr(runtime.Kernel, "launch", noted)
    return seen


TREE = TreeMask.from_parents(torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 1]]))
STEPS: dict[str, tuple[ForwardMode, list[int], list[int], TreeMask | None]] = {
    "a decode, split in three": (ForwardMode.DECODE, [1, 1], [330, 41], None),
    "an extend with a prefix": (ForwardMode.EXTEND, [5, 2], [70, 2], None),
    "a tree": (ForwardMode.TARGET_VERIFY, [4, 4], [100, 20], TREE),
}


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("name", STEPS)
def test_latent_rows_are_keys_and_values_and_are_not_copied(
    name: str, heads: int, emulated: Gfx942, launches: list[dict[str, Tensor]]
) -> None:
    mode, queries, keys, tree = STEPS[name]
    backend, layer, cache = made(heads)
    batch, tokens = batch_of(mode, queries, keys, tree), sum(queries)
    drawn = torch.Generator().manual_seed(heads)
    q = torch.randn(tokens, heads, LATENT + ROPE, generator=drawn).bfloat16()
    new = torch.randn(tokens, 1, LATENT + ROPE, generator=drawn).bfloat16()
    with Largest(cache.k(0)) as largest:
        backend.init_forward_metadata(batch)
        out, lse = backend.forward(q, new, None, layer, batch, return_lse=True)
    exact_out, exact_lse = exact(q, batch, cache)
    assert (out.double() - exact_out).abs().max() < CLOSE
    assert (lse.double() - exact_lse).abs().max() < CLOSE_LSE
    *first, second = launches
    assert first
    assert "results" in second
    for given in first:
        assert given["k"].data_ptr() == given["v"].data_ptr() == cache.k(0).data_ptr()
        assert given["v"].stride()[-3:] == (LATENT + ROPE, LATENT + ROPE, 1)
    assert largest.elements <= q.numel() < cache.k(0).numel()
    if name.startswith("a decode"):
        assert largest.elements < sum(keys) * LATENT


@pytest.mark.parametrize("copied", ["the pool", "the values of the step"])
def test_a_copy_would_be_seen(copied: str, emulated: Gfx942) -> None:
    _, _, cache = made(16)
    with Largest(cache.k(0)) as largest:
        if copied == "the pool":
            cache.k(0)[..., :LATENT].contiguous()
        else:
            cache.k(0)[torch.tensor([5, 4, 3, 2, 1, 6]), :, :LATENT].clone()
    assert largest.elements >= 330 * LATENT


def test_what_lies_behind_the_values_moves_scores_alone(emulated: Gfx942) -> None:
    """The rope's 64 columns are in no output: rows that differ there alone have the mean that each of them is."""
    backend, layer, cache = made(16)
    cache.k(0)[..., :LATENT] = torch.arange(LATENT).bfloat16() / 256
    batch = batch_of(ForwardMode.DECODE, [1], [90])
    q = torch.randn(1, 16, LATENT + ROPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    backend.init_forward_metadata(batch)
    out = backend.forward(q, cache.k(0)[1, :1, None].clone(), None, layer, batch)
    assert isinstance(out, Tensor)
    assert (out.float() - torch.arange(LATENT).bfloat16().float() / 256).abs().max() < CLOSE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_expanded_in_chunks_joined_by_lse(dtype: str, emulated: Gfx942) -> None:
    """A prefill of 128 new tokens over 70 old ones: the new causally, the old in two chunks without a mask."""
    heads, old, new = 4, 70, 128
    kind = LayerKind(heads, heads, 192, 128, layer_ids=(1,), scale=192**-0.5, ragged=True)
    latent = LayerKind(heads, 1, LATENT + ROPE, LATENT, kind="mla", layer_ids=(0,), scale=SCALE)
    config = AttentionConfig(layers=(latent, kind), dtype=dtype, page_size=PAGE, kv_layout="MLA", lse=True)
    backend, layer = WaveBackend(config, KVCache.allocate(config, num_pages=4)), AttentionLayer.of_kind(kind, 1)
    drawn = torch.Generator().manual_seed(3)
    q, k = (torch.randn(n, heads, 192, generator=drawn).to(getattr(torch, dtype)) for n in (new, old + new))
    v = torch.randn(old + new, heads, 128, generator=drawn).to(q.dtype)

    def part(first: int, last: int, causal: bool) -> tuple[Tensor, Tensor]:
        found = backend.forward_ragged(
            q, k[first:last], v[first:last], layer,
            query_start_loc=torch.tensor([0, new], dtype=torch.int32),
            key_start_loc=torch.tensor([0, last - first], dtype=torch.int32),
            max_query_len=new, max_key_len=last - first, causal=causal, return_lse=True,
        )  # fmt: skip
        assert isinstance(found, tuple)
        return found

    out, lse = merge_state(merge_state(part(0, 33, False), part(33, old, False)), part(old, old + new, True))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * 192**-0.5
    scores.masked_fill_(torch.arange(old + new) > torch.arange(old, old + new)[:, None], float("-inf"))
    assert (out.double() - torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())).abs().max() < CLOSE
    assert (lse.double() - scores.logsumexp(-1).T).abs().max() < CLOSE_LSE
