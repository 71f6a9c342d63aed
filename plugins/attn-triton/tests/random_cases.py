"""Random steps of every kind against the oracle, with NaN wherever no token lies: the same on the interpreter and on a
GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.checks import Output, output_faults
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Precision, expect
from attn_triton.backend import TritonBackend

MLA_WIDTHS = ((48, 32), (96, 64), (80, 64), (128, 96), (576, 512))
MHA_WIDTHS = ((32, 32), (64, 64), (80, 80), (96, 96), (40, 40), (48, 32), (128, 128), (192, 128), (256, 256))


@dataclass(slots=True)
class Scale:
    """How large the random steps are, and in which dtypes."""

    dtypes: tuple[str, ...] = ("float16", "float32")
    kv_dtypes: tuple[str, ...] = ("auto",)
    most_requests: int = 5
    query_lens: tuple[int, ...] = (0, 1, 2, 17, 33, 70)
    prefixes: tuple[int, ...] = (0, 1, 15, 16, 17, 60, 130)
    widest: int = 128
    groups: tuple[int, ...] = (1, 2, 3, 4, 7, 16)


GPU_SCALE = Scale(
    dtypes=("float16", "bfloat16", "bfloat16", "float32"),
    kv_dtypes=("auto", "auto", "fp8_e4m3", "fp8_e5m2"),
    most_requests=40,
    query_lens=(0, 1, 2, 17, 33, 70, 129, 300),
    prefixes=(0, 1, 15, 16, 17, 60, 130, 1000, 5000),
    widest=576,
    groups=(1, 2, 3, 4, 7, 8, 16, 20),
)


@dataclass(slots=True)
class Scene:
    """One random step, filled."""

    seed: int
    config: AttentionConfig
    batch: ForwardBatch
    cache: KVCache
    layer: AttentionLayer
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None


def make_scene(seed: int, device: str, scale: Scale) -> Scene:
    """The step of ``seed``: same seed, same step."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kind = _kind(draw, scale)
    mode = draw.choice(list(ForwardMode)[:5])
    config = AttentionConfig(
        layers=(kind,),
        dtype=draw.choice(scale.dtypes),
        kv_cache_dtype=draw.choice(scale.kv_dtypes),
        page_size=draw.choice((1, 2, 8, 16, 32, 48, 64)),
        kv_layout="MLA" if kind.kind == "mla" else draw.choice(("NHD", "HND")),
        batch_invariant=draw.random() < 0.2,
    )
    batch, cache = _batch(draw, generator, mode, config, device, scale)
    tokens = batch.num_tokens
    if kind.cross:
        assert batch.encoder_slot_mapping is not None
        tokens = batch.encoder_slot_mapping.shape[0]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(TORCH_DTYPES[config.dtype]).to(device)

    scaled = config.kv_cache_dtype != "auto"
    layer = AttentionLayer.of_kind(
        kind,
        0,
        sinks=torch.randn(kind.num_q_heads, generator=generator).to(device) if kind.sinks else None,
        k_scale=0.7 if scaled else 1.0,
        v_scale=1.3 if scaled else 1.0,
    )
    q = normal(batch.num_tokens, kind.num_q_heads, kind.qk_head_dim)
    k = normal(tokens, kind.num_kv_heads, kind.qk_head_dim)
    v = None if kind.kind == "mla" else normal(tokens, kind.num_kv_heads, kind.v_head_dim)
    return Scene(seed, config, batch, cache, layer, q, k, v)


def fault(scene: Scene, make: Callable[[AttentionConfig, KVCache], TritonBackend] = TritonBackend) -> str | None:
    """What is wrong with the backend's answer to ``scene``, None if it is right within the kit's tolerances."""
    backend = make(scene.config, scene.cache)
    backend.init_forward_metadata(scene.batch)
    out, lse = backend.forward(scene.q, scene.k, scene.v, scene.layer, scene.batch, return_lse=True)
    if not scene.batch.num_tokens:
        return None
    every = problems(scene.q, scene.layer, scene.batch, scene.cache)
    expected = expect(every, scene.q, scene.layer, Precision.of(scene.q.dtype))
    found = output_faults(Output(out, lse), expected, f"seed {scene.seed}")
    if not found:
        return None
    batch, query = scene.batch, scene.batch.query_start_loc.diff().tolist()
    step = f"{batch.mode.name} query {query} lengths {batch.seq_lens.tolist()} tree {batch.tree is not None}"
    return f"{'; '.join(map(str, found))}: {scene.config} {step} spans {batch.spans}"


def _kind(draw: random.Random, scale: Scale) -> LayerKind:
    mla = draw.random() < 0.25
    widths = [w for w in (MLA_WIDTHS if mla else MHA_WIDTHS) if w[0] <= scale.widest]
    width, v_width = draw.choice(widths)
    kv_heads, group = (1 if mla else draw.choice((1, 2, 3))), draw.choice(scale.groups)
    cross = draw.random() < 0.15
    return LayerKind(
        kv_heads * group, kv_heads, width, v_width, kind="mla" if mla else "mha", scale=width**-0.5,
        sliding_window=None if cross else draw.choice((None, None, 1, 5, 16, 40, 1000)),
        softcap=draw.choice((0.0, 0.0, 20.0)), sinks=draw.random() < 0.3, cross=cross, layer_ids=(0,),
    )  # fmt: skip


def _batch(
    draw: random.Random,
    generator: torch.Generator,
    mode: ForwardMode,
    config: AttentionConfig,
    device: str,
    scale: Scale,
) -> tuple[ForwardBatch, KVCache]:
    size, page = draw.randint(1, scale.most_requests), config.page_size
    assert page is not None
    cross = config.layers[0].cross
    query = _query_lens(draw, mode, size, scale)
    total = [n + draw.choice(scale.prefixes) for n in query]
    encoder = [draw.choice((0, 1, 20, 50)) for _ in query]
    counts = [-(-n // page) for n in (*total, *encoder)]
    order = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    pages = [[next(order) for _ in range(count)] for count in counts]
    own, others = pages[:size], pages[size:]
    cache = KVCache.allocate(config, num_pages=sum(counts) + 3, device=device)
    fill(cache, generator, list(zip([*total, *encoder], pages, strict=True)))
    batch = ForwardBatch.build(
        mode, query_lens=query, seq_lens=total, pages=own, page_size=page, device=device,
        tree=_tree(draw, query, device) if mode is ForwardMode.TARGET_VERIFY and draw.random() < 0.6 else None,
        spans=_spans(draw, total) if mode in (ForwardMode.EXTEND, ForwardMode.MIXED) and draw.random() < 0.3 else None,
        encoder_seq_lens=encoder if cross else None, encoder_pages=others if cross else None, write_encoder=cross,
    )  # fmt: skip
    if draw.random() < 0.5:
        batch.seq_lens_cpu = batch.encoder_seq_lens_cpu = None
    batch.check(page)
    return batch, cache


def _query_lens(draw: random.Random, mode: ForwardMode, size: int, scale: Scale) -> list[int]:
    if mode is ForwardMode.DECODE:
        return [1] * size
    if mode is ForwardMode.TARGET_VERIFY:
        return [draw.choice((1, 2, 4, 5))] * size
    if mode is ForwardMode.MIXED:
        decodes = draw.randint(0, size)
        return [1] * decodes + [draw.choice((2, 17, 40)) for _ in range(size - decodes)]
    return [draw.choice(scale.query_lens) for _ in range(size)]


def _tree(draw: random.Random, query: list[int], device: str) -> TreeMask:
    parents = torch.tensor([[draw.randint(-1, i - 1) for i in range(n)] for n in query])
    return TreeMask(TreeMask.from_parents(parents).visible.to(device))


def _spans(draw: random.Random, total: list[int]) -> list[list[tuple[int, int]]]:
    starts = [draw.randint(0, max(0, n - 1)) for n in total]
    return [[(start, start + draw.choice((3, 30)))] if draw.random() < 0.7 else [] for start in starts]


def fill(cache: KVCache, generator: torch.Generator, sequences: list[tuple[int, list[int]]]) -> None:
    """Normal numbers where tokens lie, NaN in every other place of the pool."""
    named = torch.tensor(sorted(chain.from_iterable(pages for _, pages in sequences)), dtype=torch.int64)
    for pool in (cache.k_nhd(0), cache.v_nhd(0, cache.k(0).shape[-1])):
        rows = torch.full(pool.shape, float("nan"))
        rows[named] = torch.randn(len(named), *pool.shape[1:], generator=generator)
        for length, pages in sequences:
            if length % cache.page_size:
                rows[pages[-1], length % cache.page_size :] = float("nan")
        pool.copy_(rows.to(pool.dtype))
