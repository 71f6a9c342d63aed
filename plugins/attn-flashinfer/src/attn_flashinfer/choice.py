"""Which of FlashInfer's kernels serve a request: fa2 or fa3, decode or prefill, a mask or none."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import TORCH_DTYPES
from attn_core.runtime.layer import AttentionLayer

#: Head widths (qk, v) for which fa3 is used, by dtype of the queries, without window and soft cap. fa3 takes minutes to
#: build for each of them, so it is kept to where it is ahead and what models serve; elsewhere fa2 is right as well.
FA3_WIDTHS: Final = {
    torch.bfloat16: ((128, 128), (192, 128)),
    torch.float16: ((192, 128),),
}


class LayerShape(NamedTuple):
    """What one plan of FlashInfer is made for; layers with the same share it."""

    num_q_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    window: int | None
    softcap: float
    scale: float
    cross: bool

    @classmethod
    def of(cls, layer: AttentionLayer | LayerKind) -> LayerShape:
        scale = layer.scale if isinstance(layer, AttentionLayer) else layer.softmax_scale
        return cls(
            layer.num_q_heads, layer.num_kv_heads, layer.qk_head_dim, layer.v_head_dim,
            layer.sliding_window, layer.softcap, float(scale or 0.0), layer.cross,
        )  # fmt: skip


class Route(NamedTuple):
    """decode: the decode wrapper, else the prefill wrapper; kernels: fa2 or fa3; masked: a packed mask replaces
    causality and window; causal: otherwise, whether keys after the query are hidden."""

    decode: bool
    kernels: str
    masked: bool
    causal: bool


def route(shape: LayerShape, batch: ForwardBatch, config: AttentionConfig, device: torch.device) -> Route:
    """The kernels for layers of ``shape`` in ``batch``.

    A mask needs fa2: fa3 has none. fa3 reads an fp8 cache only with fp8 queries, which would change the result. Few
    queries over long keys need their keys split, which only fa2 does: decode and verify are fa2.
    """
    if shape.cross:
        return Route(decode=False, kernels="fa2", masked=False, causal=False)
    if batch.mode is ForwardMode.DECODE:
        return Route(decode=True, kernels="fa2", masked=False, causal=False)
    masked = batch.tree is not None or batch.spans is not None
    fa3 = (
        not masked
        and batch.mode is not ForwardMode.TARGET_VERIFY
        and config.kv_cache_dtype == "auto"
        and takes_fa3(shape, TORCH_DTYPES[config.dtype], device)
    )
    return Route(decode=False, kernels="fa3" if fa3 else "fa2", masked=masked, causal=not masked)


def takes_fa3(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether fa3 is the better choice for a prefill of these layers on this chip."""
    widths = (shape.qk_head_dim, shape.v_head_dim)
    plain = shape.window is None and not shape.softcap
    return plain and widths in FA3_WIDTHS.get(dtype, ()) and compute_capability(device) == (9, 0)


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of the chip; (0, 0) where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
