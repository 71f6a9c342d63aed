"""A few forwards on random tensors: a prefill by workgroups of four waves, and decodes that are split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_wave.backend import WaveBackend
from attn_wave.emulator.device import Gfx942
from attn_wave.emulator.faults import EmulationError
from torch import Tensor

#: name -> new tokens and keys of each request
STEPS: dict[str, tuple[list[int], list[int]]] = {
    "extend": ([70, 3], [70, 40]),
    "decode": ([1, 1], [300, 17]),
}
PAGE = 16


def config_of(**layer: Any) -> AttentionConfig:
    """One layer of 4 query and 2 KV heads of 64, fp16."""
    kind = LayerKind(num_q_heads=4, num_kv_heads=2, qk_head_dim=64, v_head_dim=64, layer_ids=(0,), scale=0.125, **layer)
    return AttentionConfig(layers=(kind,), dtype="float16", page_size=PAGE, kv_layout="NHD", max_context_len=512)


@dataclass(frozen=True)
class Forward:
    """One forward's inputs and results."""

    name: str
    batch: ForwardBatch
    q: Tensor
    layer: AttentionLayer
    cache: KVCache
    out: Tensor
    lse: Tensor


def forwards(seed: int, steps: Sequence[str] = tuple(STEPS), **layer: Any) -> Iterator[Forward]:
    """Each of `STEPS` through the backend."""
    config = config_of(**layer)
    drawn = torch.Generator().manual_seed(seed)
    cache = KVCache.allocate(config, num_pages=64)
    for pool in (cache.k(0), cache.v(0)):
        assert pool is not None
        pool.normal_(generator=drawn)
    backend = WaveBackend(config, cache)
    for name in steps:
        queries, keys = STEPS[name]
        pages, first = [], 1
        for n in keys:
            pages.append(list(range(first, first + -(-n // PAGE))))
            first += len(pages[-1])
        mode = ForwardMode.DECODE if name == "decode" else ForwardMode.EXTEND
        batch = ForwardBatch.build(mode, query_lens=queries, seq_lens=keys, pages=pages, page_size=PAGE)
        q, k, v = (torch.randn(sum(queries), heads, 64, generator=drawn).half() for heads in (4, 2, 2))
        attention = AttentionLayer.of_kind(config.layers[0], 0)
        backend.init_forward_metadata(batch)
        out, lse = backend.forward(q, k, v, attention, batch, return_lse=True)
        yield Forward(name, batch, q, attention, cache, out, torch.as_tensor(lse))


def differences(seed: int = 0, steps: Sequence[str] = tuple(STEPS)) -> list[str]:
    """What is wrong with these forwards on the emulated chip: a fault that stopped one, or results far from exact."""
    found = []
    with Gfx942():
        try:
            for made in forwards(seed, steps):
                exact_out, exact_lse = exact(made)
                for what, got, wanted in (("out", made.out, exact_out), ("lse", made.lse, exact_lse)):
                    # NaN is far from everything
                    if not (got.double() - wanted).abs().max() < 5e-3:
                        found.append(f"{made.name}: {what}")
        except EmulationError as error:
            found.append(str(error))
    return found


def exact(made: Forward) -> tuple[Tensor, Tensor]:
    """Causal attention in fp64, a request at a time."""
    outs, lses = [], []
    k, v = made.cache.k_nhd(0).double(), made.cache.v_nhd(0).double()
    starts = made.batch.query_start_loc.tolist()
    for b, (first, last) in enumerate(pairwise(starts)):
        n = int(made.batch.seq_lens[b])
        pages = made.batch.page_table[b, : -(-n // PAGE)].long()
        keys, values = (pool[pages].flatten(0, 1)[:n].repeat_interleave(2, 1) for pool in (k, v))
        scores = torch.einsum("qhd,khd->hqk", made.q[first:last].double(), keys) * made.layer.scale
        position = torch.arange(n - (last - first), n)
        scores.masked_fill_(torch.arange(n) > position[:, None], float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)
