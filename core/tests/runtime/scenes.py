"""One layer's step over a poisoned cache, made for a test, and its comparison with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.discovery import BackendRef, Installed
from attn_core.planning.manifest import Manifest
from attn_core.planning.plan import Plan, plan
from attn_core.planning.system import System
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode, slots_of
from attn_core.runtime.kv_cache import FP8_DTYPES, TORCH_DTYPES, KVCache, cache_dtype
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Expected, Precision, expect
from torch import Tensor

CPU = System("cpu", dists={})
GQA3 = LayerKind(num_q_heads=6, num_kv_heads=2, qk_head_dim=32, v_head_dim=32)
MLA = LayerKind(num_q_heads=4, num_kv_heads=1, qk_head_dim=40, v_head_dim=32, kind="mla", scale=0.2)


@dataclass(slots=True)
class Scene:
    """A step of one layer: q [T, Hq, D], the k and v of its new tokens, and a cache that holds the prefixes."""

    config: AttentionConfig
    cache: KVCache
    layer: AttentionLayer
    batch: ForwardBatch
    q: Tensor
    k: Tensor
    v: Tensor | None

    def run(self, backend: AttentionBackend, **options: Any) -> Any:
        """The forward of a fresh batch."""
        batch = replace(self.batch, plan_state=None)
        backend.init_forward_metadata(batch)
        return backend.forward(self.q, self.k, self.v, self.layer, batch, **options)

    def expected(self) -> Expected:
        """The oracle's answer from what the cache holds now, with its tolerances."""
        found = problems(self.q, self.layer, self.batch, self.cache)
        return expect(found, self.q, self.layer, Precision.of(self.q.dtype))


def scene(
    kind: LayerKind = GQA3,
    mode: ForwardMode = ForwardMode.EXTEND,
    *,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    page_size: int = 16,
    layout: str = "NHD",
    dtype: str = "float32",
    kv_dtype: str = "auto",
    cache: KVCache | None = None,
    encoder_lens: Sequence[int] | None = None,
    seed: int = 0,
    **batch: Any,
) -> Scene:
    """Pages in shuffled order, NaN wherever no token of the requests lies."""
    config = AttentionConfig(
        (replace(kind, layer_ids=(0,)),),
        dtype=dtype,
        kv_cache_dtype=kv_dtype,
        page_size=page_size,
        kv_layout="MLA" if kind.kind == "mla" else layout,
    )
    rng = torch.Generator().manual_seed(seed)
    lens = [*seq_lens, *(encoder_lens or ())]
    counts = [-(-n // page_size) for n in lens]
    ids = iter((torch.randperm(sum(counts), generator=rng) + 1).tolist())
    pages = [[next(ids) for _ in range(count)] for count in counts]
    if cache is None:
        cache = KVCache.allocate(config, num_pages=sum(counts) + 2)
    poison(cache)
    fp8 = cache_dtype(config) in FP8_DTYPES
    layer = AttentionLayer.of_kind(
        config.layers[0],
        0,
        sinks=torch.randn(kind.num_q_heads, generator=rng) if kind.sinks else None,
        k_scale=0.05 if fp8 else 1.0,
        v_scale=0.03 if fp8 else 1.0,
    )

    def rows(count: int, heads: int, width: int) -> Tensor:
        return torch.randn(count, heads, width, generator=rng).to(TORCH_DTYPES[dtype])

    def keys(count: int) -> tuple[Tensor, Tensor | None]:
        k = rows(count, kind.num_kv_heads, kind.qk_head_dim)
        return k, None if kind.kind == "mla" else rows(count, kind.num_kv_heads, kind.v_head_dim)

    for b, (new, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if kind.cross:
            continue
        prefix = torch.tensor(slots_of(pages[b], range(length - new), page_size), dtype=torch.int64)
        cache.write(layer, prefix, *keys(prefix.shape[0]))
    step = ForwardBatch.build(
        mode,
        query_lens=query_lens,
        seq_lens=seq_lens,
        pages=pages[: len(seq_lens)],
        page_size=page_size,
        encoder_seq_lens=encoder_lens,
        encoder_pages=None if encoder_lens is None else pages[len(seq_lens) :],
        write_encoder=encoder_lens is not None,
        **batch,
    )
    k, v = keys(sum(encoder_lens) if kind.cross and encoder_lens else step.num_tokens)
    return Scene(config, cache, layer, step, rows(step.num_tokens, kind.num_q_heads, kind.qk_head_dim), k, v)


def poison(cache: KVCache) -> None:
    """NaN in every slot of every layer."""
    for layer_id in cache.layer_ids:
        for pool in (cache.k(layer_id), cache.v(layer_id)):
            if pool is not None and pool.dtype in FP8_DTYPES:
                pool.view(torch.uint8).fill_(0x7F)
            elif pool is not None:
                pool.fill_(float("nan"))


def assert_right(result: Any, expected: Expected) -> None:
    """``(out, lse)`` or out alone, within the oracle's tolerances in every row."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    error = (out.double() - expected.out).abs()
    assert out.shape == expected.out.shape
    assert bool((error <= expected.value).all()), f"off by {float((error - expected.value).max()):.3g} in one value"
    assert bool((error.square().mean(-1).sqrt() <= expected.row).all()), "off in the mean of a row"
    if lse is not None:
        infinite = expected.lse.isinf()
        assert torch.equal(lse[infinite].double(), expected.lse[infinite])
        assert bool(((lse.double() - expected.lse).abs() <= expected.lse_value)[~infinite].all()), "lse"


def native(scene: Scene) -> TorchNativeBackend:
    """torch_native over the scene's cache."""
    return TorchNativeBackend(scene.config, scene.cache)


CLAUSE: dict[str, Any] = {
    "phases": ["prefill", "decode", "verify", "draft"],
    "device": "any",
    "kind": "mha",
    "dtypes": ["float32", "bfloat16"],
    "kv_dtypes": ["auto", "fp8_e4m3"],
    "head_dims": "any",
    "page_sizes": "any",
    "kv_layouts": ["NHD", "HND"],
    "features": ["sliding_window", "softcap", "sinks", "lse", "verify_chain", "verify_tree", "bidirectional_spans"],
}


def ref(name: str, cls: type | None = TorchNativeBackend, *, object_: str = "", **clause: Any) -> BackendRef:
    """An installed backend of one clause, whose class is ``cls``, or is to be imported from ``object_``."""
    fallback = clause.pop("fallback", {})
    protocol = clause.pop("protocol", ">=1.0,<2")
    data = {
        "schema": 1,
        "name": name,
        "protocol": protocol,
        "summary": "made for a test",
        "fallback": fallback,
        "supports": [{**CLAUSE, **clause}],
    }
    manifest = Manifest.parse({key: value for key, value in data.items() if value != {}}, source=f"<{name}>")
    return BackendRef(name, f"attn-{name}", "1.0", object_, manifest, name, cls=cls)


def planned(config: AttentionConfig, *refs: BackendRef, backend: Any = "auto", **options: Any) -> Plan:
    """The plan on a CPU where exactly these backends are installed."""
    return plan(config, backend, system=CPU, installed=Installed(refs), rankings=lambda *_: {}, **options)
