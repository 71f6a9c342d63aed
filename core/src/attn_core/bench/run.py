"""Measuring an installed backend on a shape: through plan and build, on random data in shuffled pages."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attn_core.bench.results import Results, Row
from attn_core.bench.shapes import Shape
from attn_core.bench.timing import time_call
from attn_core.planning.discovery import discover
from attn_core.planning.plan import Plan, plan
from attn_core.planning.system import System
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import FP8_DTYPES, TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.devices import device_name
from attn_core.testing.reference import reference


@dataclass(slots=True, eq=False)
class Workload:
    """A shape with its tensors: a filled cache in shuffled pages, one batch, q, k, v of the step."""

    shape: Shape
    layer: AttentionLayer
    cache: KVCache
    batch: ForwardBatch
    q: Tensor
    k: Tensor
    v: Tensor | None
    pages: list[list[int]]

    @classmethod
    def make(
        cls, shape: Shape, plan: Plan, device: torch.device, *, mode: ForwardMode | None = None, seed: int = 0
    ) -> Workload:
        """Random tensors for ``shape``, in the cache of ``plan``; ``mode`` DECODE or EXTEND if not given."""
        config = plan.config
        assert config.page_size is not None
        counts = [-(-length // config.page_size) for length in shape.seq_lens]
        order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1).tolist()
        starts = [sum(counts[:b]) for b in range(len(counts))]
        pages = [order[start : start + count] for start, count in zip(starts, counts, strict=True)]
        cache = KVCache.allocate(config, num_pages=len(order) + 1, device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        _fill(cache, generator)
        batch = ForwardBatch.build(
            mode or (ForwardMode.DECODE if shape.phase == "decode" else ForwardMode.EXTEND),
            query_lens=shape.query_lens,
            seq_lens=shape.seq_lens,
            pages=pages,
            page_size=config.page_size,
            device=device,
        )
        kind = config.layers[0]
        sinks = torch.randn(kind.num_q_heads, device=device, generator=generator) if kind.sinks else None
        layer = AttentionLayer.of_kind(kind, 0, sinks=sinks)
        q = _normal((batch.num_tokens, shape.num_q_heads, shape.qk_head_dim), config.dtype, generator)
        k = _rows(cache.k_nhd(0), batch.slot_mapping, q.dtype)
        v = None if shape.kind == "mla" else _rows(cache.v_nhd(0), batch.slot_mapping, q.dtype)
        return cls(shape, layer, cache, batch, q, k, v, pages)

    def call(self, backend: AttentionBackend) -> Callable[[], Tensor]:
        """One layer's forward, its keys in the cache already; the metadata is made now, once a step as always."""
        backend.init_forward_metadata(self.batch)

        def forward() -> Tensor:
            out = backend.forward(self.q, self.k, self.v, self.layer, self.batch, save_kv_cache=False)
            assert isinstance(out, Tensor)
            return out

        return forward

    def error(self, out: Tensor, *, requests: int = 3, rows: int = 16) -> float:
        """||out - ref|| / ||ref|| over the last ``rows`` tokens of ``requests`` requests spread over the batch."""
        lengths = self.shape.query_lens
        chosen = sorted({round(i * (len(lengths) - 1) / max(1, requests - 1)) for i in range(requests)})
        ends = [sum(lengths[: b + 1]) for b in chosen]
        tails = [min(rows, lengths[b]) for b in chosen]
        picked = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, tails, strict=True)]).to(out.device)
        part = ForwardBatch.build(
            ForwardMode.EXTEND,
            query_lens=tails,
            seq_lens=[self.shape.seq_lens[b] for b in chosen],
            pages=[self.pages[b] for b in chosen],
            page_size=self.cache.page_size,
            device=out.device,
        )
        expected, _ = reference(self.q[picked], self.layer, part, self.cache)
        return float((out[picked].to(expected.device).double() - expected).norm() / expected.norm())


def measure(
    name: str, shape: Shape, *, device: str, dtype: str = "bfloat16", kv_cache_dtype: str = "auto", seconds: float = 0.5
) -> Row:
    """Time and check backend ``name`` on ``shape``. Raises what planning raises if it refuses the shape."""
    chosen = plan(
        shape.config(dtype, kv_cache_dtype), backend=name, fallback="error" if shape.phase == "decode" else "allow"
    )
    work = Workload.make(shape, chosen, torch.device(device))
    forward = work.call(build(chosen, work.cache))
    err = work.error(forward())
    ms = time_call(forward, torch.device(device), seconds=seconds)
    return row(shape, f"attn:{name}", ms, itemsize=work.cache.dtype.itemsize, err=err)


def row(shape: Shape, impl: str, ms: float, *, itemsize: int, err: float | None = None, note: str | None = None) -> Row:
    """A Row with the rates that ``ms`` means for ``shape``."""
    gbs = shape.cache_bytes(itemsize) / ms / 1e6
    return Row(shape.bench, shape.name, impl, ms, gbs, shape.flops / ms / 1e9, err, note)


def results(rows: Iterable[Row], system: System) -> Results:
    """Rows with this machine's device name and the versions of what ran."""
    device = device_name("cuda" if system.device == "rocm" else system.device)
    rows = tuple(rows)
    measured = {row.impl.removeprefix("attn:") for row in rows}
    libraries = [r for ref in discover().backends if ref.listed in measured for r in ref.manifest.requires_dists]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: version for name, version in system.dists.items() if name.startswith("attn-")}
    versions |= {name: version for library in libraries for name, version in library.found(system.dists).items()}
    return Results(device, versions, rows)


def default_path(found: Results, bench: str, root: Path = Path("benchmarks/results")) -> Path:
    """``root/<device>/<bench>.json``."""
    from attn_core.bench.results import device_slug

    return root / device_slug(found.device) / f"{bench}.json"


def _fill(cache: KVCache, generator: torch.Generator) -> None:
    for layer_id in cache.layer_ids:
        for pool in (cache.k(layer_id), cache.v(layer_id)):
            if pool is not None:
                # a slice at a time: fp8 has no normal_, and a copy of all would be large
                for pages in torch.split(pool, 4096):
                    pages.copy_(torch.randn(pages.shape, device=pool.device, generator=generator).to(pool.dtype))


def _normal(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=generator.device, generator=generator).to(TORCH_DTYPES[dtype])


def _rows(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """What the cache holds at ``slots``, as [T, Hkv, D] of ``dtype``: the step's k or v, already written."""
    page_size = pool.shape[1]
    source = pool.view(torch.uint8) if pool.dtype in FP8_DTYPES else pool
    found = source[slots // page_size, slots % page_size]
    return (found.view(pool.dtype) if pool.dtype in FP8_DTYPES else found).to(dtype)
