"""Small steps that between them launch every kernel, in the forms that a GPU runs: for the machine that runs PTX, and
for the sanitizers.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Final

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.checks import Output, output_faults
from attn_core.testing.reference import Problem, problems, ragged_problems
from attn_core.testing.tolerances import Precision, expect
from attn_triton.backend import TritonBackend
from attn_triton.parameters import FORCED
from random_cases import fill

Backend = Callable[[AttentionConfig, KVCache], TritonBackend]


@dataclass(frozen=True, slots=True)
class ChosenStep:
    """``launches``: the kernels after the write, without ``_kernel``. ``new`` tokens and ``cached`` ones of each
    request, and what the layer is. ``blind``: the host knows no lengths. ``replayed``: from the buffers of graphs.
    ``odd``: queries at strides that are no multiples of 16 bytes. ``spans``: of each request one. ``encoder``: of each
    request so many keys, for a cross layer. A layer whose kind is ragged is given new and cached keys, and nothing is
    written. ``forced``: in place of the table.
    """

    launches: str
    new: tuple[int, ...]
    cached: tuple[int, ...]
    mode: ForwardMode = ForwardMode.EXTEND
    heads: tuple[int, int] = (4, 1)
    widths: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    page: int = 16
    layout: str = "NHD"
    kind: dict[str, Any] = field(default_factory=dict)
    tree: bool = False
    blind: bool = False
    replayed: bool = False
    invariant: bool = False
    odd: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    encoder: tuple[int, ...] = ()
    forced: dict[str, Any] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        return bool(self.kind.get("ragged"))

    @property
    def kernels(self) -> list[str]:
        """All that it launches."""
        return [f"{name}_kernel" for name in ([] if self.ragged else ["write"]) + self.launches.split()]


_DECODE, _EXTEND, _VERIFY = ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.TARGET_VERIFY
_MLA: Final[dict[str, Any]] = {"heads": (16, 1), "widths": (576, 512), "page": 64, "layout": "MLA"}


def _fp8(warps: int, keys: int) -> dict[str, Any]:
    """``keys`` of each warp in a tile of the Gluon kernel over an fp8 cache."""
    return {"decode": {"gluon": True, "block_n": warps * keys, "warps": warps, "per_sm": max(1, 8 // warps)}}


STEPS: Final[dict[str, ChosenStep]] = {
    "decode in pieces": ChosenStep("decode merge", (1,), (300,), _DECODE),
    "decode in equal pieces of a line": ChosenStep(
        "schedule decode merge", (1, 1, 1), (500, 3, 60), _DECODE, heads=(6, 2)
    ),
    "decode without the lengths": ChosenStep(
        "schedule decode merge", (1, 1), (200, 190), _DECODE, heads=(8, 2), blind=True
    ),
    "decode with a window, a cap and sinks": ChosenStep(
        "decode",
        (1, 1),
        (150, 40),
        _DECODE,
        widths=(80, 80),
        dtype="float16",
        page=8,
        layout="HND",
        kind={"sliding_window": 50, "softcap": 20.0, "sinks": True},
    ),
    "decode over fp8": ChosenStep(
        "schedule gluon_decode merge", (1, 1), (150, 40), _DECODE, kv_dtype="fp8_e4m3", forced=_fp8(1, 32)
    ),
    "decode over fp8 in pieces": ChosenStep(
        "gluon_decode merge",
        (1,),
        (700,),
        _DECODE,
        heads=(8, 2),
        dtype="float16",
        kv_dtype="fp8_e5m2",
        forced=_fp8(4, 32),
    ),
    "decode over fp8 with a window, a cap and sinks": ChosenStep(
        "gluon_decode",
        (1, 1),
        (300, 40),
        _DECODE,
        heads=(6, 2),
        widths=(64, 64),
        kv_dtype="fp8_e4m3",
        layout="HND",
        kind={"sliding_window": 50, "softcap": 20.0, "sinks": True},
        forced=_fp8(8, 16),
    ),
    "decode over fp8 in small pages, without the lengths": ChosenStep(
        "schedule gluon_decode merge",
        (1, 1),
        (150, 370),
        _DECODE,
        heads=(16, 1),
        widths=(128, 64),
        kv_dtype="fp8_e5m2",
        page=8,
        kind={"sinks": True},
        blind=True,
        forced=_fp8(2, 32),
    ),
    "decode over fp8 in pages of no power of two, from the buffers of graphs": ChosenStep(
        "refresh refresh schedule schedule gluon_decode merge",
        (1, 1),
        (2, 370),
        _DECODE,
        widths=(64, 128),
        kv_dtype="fp8_e4m3",
        page=48,
        kind={"sliding_window": 130},
        replayed=True,
        forced=_fp8(1, 16),
    ),
    "decode over fp8, heads of another width": ChosenStep(
        "schedule decode merge", (1, 1), (150, 40), _DECODE, widths=(96, 96), kv_dtype="fp8_e4m3"
    ),
    "verify a tree": ChosenStep("tree_depth schedule decode merge", (4, 4), (70, 20), _VERIFY, tree=True),
    "decode from the buffers of graphs": ChosenStep(
        "refresh refresh schedule schedule decode merge", (1, 1), (200, 30), _DECODE, heads=(8, 2), replayed=True
    ),
    "verify many rows": ChosenStep("decode merge", (4,), (150,), _VERIFY, heads=(16, 1), kv_dtype="fp8_e5m2"),
    "extend by the copy engine": ChosenStep(
        "gluon_extend", (40, 1), (300, 5), heads=(4, 2), page=64, layout="HND", dtype="float16"
    ),
    "extend by the copy engine, over many tiles": ChosenStep("gluon_extend", (20,), (800,)),
    "extend by the copy engine, mapped": ChosenStep(
        "tile_map gluon_extend", (130, 2, 3), (0, 10, 130), heads=(3, 3), page=32
    ),
    "extend by the copy engine, odd strides": ChosenStep("gluon_extend", (70, 3), (60, 3), heads=(6, 6), odd=True),
    "extend with a window": ChosenStep("extend", (70,), (60,), widths=(96, 96), kind={"sliding_window": 40}),
    "extend over fp8, keys and values of two widths": ChosenStep(
        "extend", (65,), (30,), widths=(64, 32), kv_dtype="fp8_e5m2", dtype="float16", page=64
    ),
    "verify a tree with a window": ChosenStep(
        "tree_depth decode", (5, 5), (20, 100), _VERIFY, heads=(16, 1), tree=True, kind={"sliding_window": 30}
    ),
    "extend, odd strides": ChosenStep("extend", (20,), (30,), widths=(64, 64), odd=True),
    "extend with images, which see themselves both ways": ChosenStep(
        "tile_map extend", (70, 3), (30, 20), widths=(64, 64), spans=((40, 60), (0, 22))
    ),
    "decode of an encoder's keys": ChosenStep(
        "schedule decode merge",
        (1, 1),
        (5, 70),
        _DECODE,
        heads=(8, 2),
        widths=(64, 64),
        encoder=(190, 33),
        kind={"cross": True},
    ),
    "extend over an encoder's keys": ChosenStep(
        "extend", (70,), (0,), widths=(64, 64), kv_dtype="fp8_e4m3", encoder=(90,), kind={"cross": True, "sinks": True}
    ),
    "extend over keys that are given, of two widths": ChosenStep(
        "tile_map extend", (70, 3), (20, 60), widths=(192, 128), kind={"ragged": True}
    ),
    "extend over keys that are given, both ways": ChosenStep(
        "extend", (33,), (0,), widths=(80, 80), dtype="float16", kind={"ragged": True, "causal": False}
    ),
    "decode in fp32": ChosenStep("decode merge", (1,), (200,), _DECODE, widths=(64, 64), dtype="float32"),
    "verify in fp32, wide heads": ChosenStep(
        "decode", (5,), (20,), _VERIFY, heads=(8, 2), widths=(192, 256), dtype="float32", kv_dtype="fp8_e5m2"
    ),
    "extend in fp32": ChosenStep("extend", (20,), (10,), widths=(128, 128), dtype="float32"),
    "extend MLA": ChosenStep("extend", (6,), (40,), **{**_MLA, "widths": (80, 64)}),
    "decode MLA by the copy engine": ChosenStep("mla", (1,), (90,), _DECODE, **_MLA),
    "decode MLA by the copy engine, a line": ChosenStep("schedule mla merge", (1, 1), (700, 3), _DECODE, **_MLA),
}


@dataclass(frozen=True, slots=True)
class Played:
    """What a backend found in a step, and what there was to find."""

    layer: AttentionLayer
    q: torch.Tensor
    every: list[Problem]
    found: Output


def step_faults(step: ChosenStep, device: str, backend: Backend = TritonBackend) -> list[str]:
    """What is wrong with the backend's answer to a step, with NaN wherever no token lies."""
    played = play(step, device, backend)
    expected = expect(iter(played.every), played.q, played.layer, Precision.of(played.q.dtype))
    return [str(fault) for fault in output_faults(played.found, expected, "")]


def play(step: ChosenStep, device: str, backend: Backend = TritonBackend) -> Played:
    """A step, and what the backend says to it."""
    with unittest.mock.patch.dict(FORCED, step.forced):
        return _given(step, device, backend) if step.ragged else _played(step, device, backend)


def _played(step: ChosenStep, device: str, backend: Backend) -> Played:
    config, layer, batch, cache, inputs = _made(step, device)
    made = backend(config, cache)
    if step.replayed:
        made.init_cuda_graph_state(batch.batch_size, batch.num_tokens)
        made.init_forward_metadata_capture_cuda_graph(batch)
        made.init_forward_metadata_replay_cuda_graph(batch)
    else:
        made.init_forward_metadata(batch)
    out, lse = made.forward(*inputs, layer, batch, return_lse=True)
    return Played(layer, inputs[0], list(problems(inputs[0], layer, batch, cache)), Output(out, lse))


def _given(step: ChosenStep, device: str, backend: Backend) -> Played:
    """The step of a layer that is given its keys."""
    config, layer, _, cache, (q, k, v) = _made(step, device)
    total = [new + cached for new, cached in zip(step.new, step.cached, strict=True)]
    starts, key_starts = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (step.new, total)
    )
    causal = config.layers[0].causal
    out, lse = backend(config, cache).forward_ragged(
        q, k, v, layer, query_start_loc=starts, key_start_loc=key_starts, max_query_len=max(step.new),
        max_key_len=max(total), causal=causal, return_lse=True,
    )  # fmt: skip
    every = ragged_problems(q, k, v, layer, query_start_loc=starts, key_start_loc=key_starts, causal=causal)
    return Played(layer, q, list(every), Output(out, lse))


def _made(
    step: ChosenStep, device: str
) -> tuple[AttentionConfig, AttentionLayer, ForwardBatch, KVCache, tuple[Any, Any, Any]]:
    generator = torch.Generator().manual_seed(7)
    (q_heads, kv_heads), (qk, v_width) = step.heads, step.widths
    mla = step.layout == "MLA"
    kind = LayerKind(
        q_heads, kv_heads, qk, v_width, kind="mla" if mla else "mha", scale=qk**-0.5, layer_ids=(0,), **step.kind
    )
    kinds = (kind, replace(kind, ragged=False, causal=True, layer_ids=(1,))) if step.ragged else (kind,)
    config = AttentionConfig(
        layers=kinds, dtype=step.dtype, kv_cache_dtype=step.kv_dtype, page_size=step.page, kv_layout=step.layout,
        batch_invariant=step.invariant,
    )  # fmt: skip
    total = [new + cached for new, cached in zip(step.new, step.cached, strict=True)]
    counts = [-(-n // step.page) for n in (*total, *step.encoder)]
    order = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    pages = [[next(order) for _ in range(count)] for count in counts]
    own, others = pages[: len(total)], pages[len(total) :]
    cache = KVCache.allocate(config, num_pages=sum(counts) + 2, device=device)
    if not step.ragged:
        fill(cache, generator, list(zip([*total, *step.encoder], pages, strict=True)))
    tree = None
    if step.tree:
        parents = torch.tensor([[-1, 0, 0, 1, 2][: step.new[0]]] * len(step.new))
        tree = TreeMask(TreeMask.from_parents(parents).visible.to(device))
    batch = ForwardBatch.build(
        step.mode, query_lens=step.new, seq_lens=total, pages=own, page_size=step.page, device=device, tree=tree,
        spans=[[span] for span in step.spans] or None, encoder_seq_lens=step.encoder or None,
        encoder_pages=others or None, write_encoder=bool(step.encoder),
    )  # fmt: skip
    if step.blind:
        batch.seq_lens_cpu = None

    keys = sum(step.encoder) if step.encoder else sum(total if step.ragged else step.new)

    def normal(heads: int, width: int, tokens: int = keys) -> torch.Tensor:
        return torch.randn(tokens, heads, width, generator=generator).to(TORCH_DTYPES[step.dtype]).to(device)

    sinks = torch.randn(q_heads, generator=generator).to(device) if kind.sinks else None
    scaled = {} if step.kv_dtype == "auto" else {"k_scale": 0.7, "v_scale": 0.7 if mla else 1.3}
    layer = AttentionLayer.of_kind(kind, 0, sinks=sinks, **scaled)
    v = None if mla else normal(kv_heads, v_width)
    q = normal(q_heads, qk + 1, sum(step.new))[..., :qk] if step.odd else normal(q_heads, qk, sum(step.new))
    return config, layer, batch, cache, (q, normal(kv_heads, qk), v)
