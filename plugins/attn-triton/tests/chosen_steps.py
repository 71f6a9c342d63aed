"""Small steps that between them launch every kernel, in the forms that a GPU runs: for the machine that runs PTX,
and for
the sanitizers.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.checks import Output, output_faults
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Precision, expect
from attn_triton.backend import TritonBackend
from attn_triton.parameters import FORCED
from random_cases import fill

Backend = Callable[[AttentionConfig, KVCache], TritonBackend]


@dataclass(frozen=True, slots=True)
class ChosenStep:
    """``launches``: the kernels after the write, without ``_kernel``. ``new`` tokens and ``cached`` ones of each
    request, and what the layer is. ``blind``: the host knows no lengths. ``replayed``: from the buffers of graphs.
    ``odd``: queries at strides that are no multiples of 16 bytes. ``forced``: in place of the table.
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
    forced: dict[str, Any] = field(default_factory=dict)


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
    "extend MLA": ChosenStep("extend", (6,), (40,), **{**_MLA, "widths": (80, 64)}),
    "decode MLA by the copy engine": ChosenStep("mla", (1,), (90,), _DECODE, **_MLA),
    "decode MLA by the copy engine, a line": ChosenStep("schedule mla merge", (1, 1), (700, 3), _DECODE, **_MLA),
}


def step_faults(step: ChosenStep, device: str, backend: Backend = TritonBackend) -> list[str]:
    """What is wrong with the backend's answer to a step, with NaN wherever no token lies."""
    layer, batch, cache, q, found = play(step, device, backend)
    expected = expect(problems(q, layer, batch, cache), q, layer, Precision.of(q.dtype))
    return [str(fault) for fault in output_faults(found, expected, "")]


def play(
    step: ChosenStep, device: str, backend: Backend = TritonBackend
) -> tuple[AttentionLayer, ForwardBatch, KVCache, torch.Tensor, Output]:
    """A step, its queries and what the backend says to them."""
    with unittest.mock.patch.dict(FORCED, step.forced):
        return _played(step, device, backend)


def _played(
    step: ChosenStep, device: str, backend: Backend
) -> tuple[AttentionLayer, ForwardBatch, KVCache, torch.Tensor, Output]:
    config, layer, batch, cache, inputs = _made(step, device)
    made = backend(config, cache)
    if step.replayed:
        made.init_cuda_graph_state(batch.batch_size, batch.num_tokens)
        made.init_forward_metadata_capture_cuda_graph(batch)
        made.init_forward_metadata_replay_cuda_graph(batch)
    else:
        made.init_forward_metadata(batch)
    out, lse = made.forward(*inputs, layer, batch, return_lse=True)
    return layer, batch, cache, inputs[0], Output(out, lse)


def _made(
    step: ChosenStep, device: str
) -> tuple[AttentionConfig, AttentionLayer, ForwardBatch, KVCache, tuple[Any, Any, Any]]:
    generator = torch.Generator().manual_seed(7)
    (q_heads, kv_heads), (qk, v_width) = step.heads, step.widths
    mla = step.layout == "MLA"
    kind = LayerKind(
        q_heads, kv_heads, qk, v_width, kind="mla" if mla else "mha", scale=qk**-0.5, layer_ids=(0,), **step.kind
    )
    config = AttentionConfig(
        layers=(kind,), dtype=step.dtype, kv_cache_dtype=step.kv_dtype, page_size=step.page, kv_layout=step.layout,
        batch_invariant=step.invariant,
    )  # fmt: skip
    total = [new + cached for new, cached in zip(step.new, step.cached, strict=True)]
    counts = [-(-n // step.page) for n in total]
    order = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    pages = [[next(order) for _ in range(count)] for count in counts]
    cache = KVCache.allocate(config, num_pages=sum(counts) + 2, device=device)
    fill(cache, generator, list(zip(total, pages, strict=True)))
    tree = None
    if step.tree:
        parents = torch.tensor([[-1, 0, 0, 1, 2][: step.new[0]]] * len(step.new))
        tree = TreeMask(TreeMask.from_parents(parents).visible.to(device))
    batch = ForwardBatch.build(
        step.mode, query_lens=step.new, seq_lens=total, pages=pages, page_size=step.page, device=device, tree=tree
    )
    if step.blind:
        batch.seq_lens_cpu = None

    def normal(heads: int, width: int) -> torch.Tensor:
        return torch.randn(sum(step.new), heads, width, generator=generator).to(TORCH_DTYPES[step.dtype]).to(device)

    sinks = torch.randn(q_heads, generator=generator).to(device) if kind.sinks else None
    scaled = {} if step.kv_dtype == "auto" else {"k_scale": 0.7, "v_scale": 0.7 if mla else 1.3}
    layer = AttentionLayer.of_kind(kind, 0, sinks=sinks, **scaled)
    v = None if mla else normal(kv_heads, v_width)
    q = normal(q_heads, qk + 1)[..., :qk] if step.odd else normal(q_heads, qk)
    return config, layer, batch, cache, (q, normal(kv_heads, qk), v)
