"""Attention over keys that are given: vision encoders, expanded MLA prefill."""

from __future__ import annotations

import torch
from attn_core.errors import BatchError, ConfigError
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_triton.extend import ExtendKernels, Rows
from attn_triton.geometry import Geometry
from attn_triton.kinds import BoundLayer, kind_of, score_scale


def attend_rows(
    kernels: ExtendKernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: AttentionLayer,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    max_query_len: int,
    causal: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill out [T, Hq, Dv] (and lse [T, Hq]) from k [S, Hkv, Dqk] and v [S, Hkv, Dv]. Raises ConfigError,
    BatchError.
    """
    if layer.sliding_window is not None and not causal:
        raise ConfigError(
            f"layer {layer.layer_id}: a window of {layer.sliding_window} on keys that are not causal",
            accepted="a window with causal=True",
        )
    wanted = ((k.shape[0], layer.num_kv_heads, layer.qk_head_dim), (k.shape[0], layer.num_kv_heads, layer.v_head_dim))
    if (tuple(k.shape), tuple(v.shape)) != wanted or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise BatchError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)}",
            accepted=f"{wanted[0]} and {wanted[1]}, the last dimension contiguous",
        )
    starts, key_starts = query_start_loc.to(torch.int32), key_start_loc.to(torch.int32)
    kind = kind_of(layer, Geometry.of_rows(layer, k, v, q.dtype))
    rows = Rows(
        batch=query_start_loc.shape[0] - 1,
        num_tokens=q.shape[0],
        max_query_len=max_query_len,
        starts=starts,
        lengths=None,
        pages=None,
        key_starts=key_starts,
        causal=causal,
    )
    bound = BoundLayer(layer, kind, -1, k, v)
    kernels.bind_rows(rows, bound, q, out, lse).run(q, out, lse, bound, score_scale(layer))
