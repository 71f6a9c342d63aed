"""Plans of FlashInfer's MLA wrapper: what a layer is to it, and a step's wrappers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

#: The most query heads of one call: a tile of the kernels has 64 or 128 rows, each a head of a token.
MAX_HEADS: Final = 128


class LatentShape(NamedTuple):
    """What one plan is made for: layers with the same share it."""

    num_heads: int
    latent_dim: int
    rope_dim: int
    scale: float

    @classmethod
    def of(cls, layer: AttentionLayer | LayerKind) -> LatentShape:
        scale = layer.scale if isinstance(layer, AttentionLayer) else layer.softmax_scale
        rope = layer.qk_head_dim - layer.v_head_dim
        return cls(layer.num_q_heads, layer.v_head_dim, rope, float(scale or 0.0))

    @property
    def padded_heads(self) -> int:
        """The next power of two. With other numbers a tile ends inside a token, and there the causal kernels would
        drop a key: the library refuses such lengths when it meets them. Heads of zeros cost less than a refusal.
        """
        return 1 << (self.num_heads - 1).bit_length()


@dataclass(slots=True, eq=False, weakref_slot=True)
class MLAStep:
    """What `init_forward_metadata` leaves on the batch: ``wrappers`` by layer shape."""

    wrappers: dict[LatentShape, Any] = field(default_factory=dict)


def plan_latent(
    wrapper: Any,
    library: Any,
    shape: LatentShape,
    config: AttentionConfig,
    cache: KVCache,
    *,
    causal: bool,
    query_starts: Tensor,
    indptr: Tensor,
    indices: Tensor,
    lens: Tensor,
) -> None:
    """Plan ``wrapper`` for layers of ``shape``: query_starts, indptr [B + 1] and lens [B] int32 on the host.

    The log-sum-exp is always planned, in natural units: the wrapper cannot be asked for it later.
    """
    wrapper.plan(
        metadata=library.mla_metadata.csr(query_starts, indptr, indices, lens),
        num_heads=shape.padded_heads,
        head_dim_ckv=shape.latent_dim,
        head_dim_kpe=shape.rope_dim,
        page_size=cache.page_size,
        causal=causal,
        sm_scale=shape.scale,
        q_data_type=getattr(torch, config.dtype),
        kv_data_type=cache.dtype,
        query_layout="split",
        kv_cache_layout="split",
        lse_mode="basee",
    )
