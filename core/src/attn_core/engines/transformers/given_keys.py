"""Attention over keys that are given: vision towers, forward passes without a cache, other caches than ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.engines.facts import dtype_name, system_of
from attn_core.engines.refusals import planned_by
from attn_core.engines.transformers.masks import StepMask
from attn_core.engines.transformers.names import INSTEAD
from attn_core.engines.transformers.packing import Packing
from attn_core.errors import BatchError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import plan
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.build import build, settle
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer

#: scale, window (None or W), soft cap (0 = off) and sinks ([Hq] or None) of an attention call
Maths = tuple[float, int | None, float, Tensor | None]


@dataclass(slots=True)
class Lengths:
    """Packed queries and keys: where those of each request begin [B + 1] int32, and the longest."""

    query_start_loc: Tensor
    key_start_loc: Tensor
    max_query_len: int
    max_key_len: int


class GivenKeys:
    """One backend for each kind of layer that is seen, through feature `ragged`, planned when it is first seen."""

    def __init__(self, backend: str) -> None:
        self._name = backend
        self._built: dict[Any, tuple[AttentionBackend, LayerKind]] = {}
        self._layers: dict[Any, AttentionLayer] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: StepMask | None, maths: Maths, *, causal: bool
    ) -> Tensor:
        """query [B, Hq, Q, D], key and value [B, Hkv, K, D] -> [B, Q, Hq, Dv]; padding is left out and gives zeros.

        Raises BatchError for a mask of other columns than there are keys, PlanError where no backend can do it.
        """
        batch_size, columns = query.shape[0], key.shape[2]
        valid = None if mask is None else mask.valid
        if mask is not None and (mask.kv_length != columns or mask.q_length != query.shape[2]):
            raise BatchError(
                f"{query.shape[2]} queries and {columns} keys under a mask of {mask.q_length} by {mask.kv_length}",
                accepted="keys that the mask was made for; caches of a fixed length are not known",
            )
        if mask is not None and mask.q_offset + mask.q_length != mask.kv_offset + mask.kv_length:
            raise BatchError(
                f"queries at {mask.q_offset} to {mask.q_offset + mask.q_length} over keys up to"
                f" {mask.kv_offset + mask.kv_length}",
                accepted="the queries of the last keys: caches of a fixed length are not known",
            )
        queries = Packing(batch_size, query.shape[2], valid if causal else None, query.device)
        keys = Packing(batch_size, columns, valid, query.device)
        lengths = Lengths(queries.starts, keys.starts, max(queries.lens), max(keys.lens))
        packed = queries.pack(query), keys.pack(key), keys.pack(value)
        return queries.unpack(self.attend_packed(*packed, lengths, maths, causal=causal))

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, maths: Maths, *, causal: bool) -> Tensor:
        """q [T, Hq, D], k [S, Hkv, D], v [S, Hkv, Dv] -> [T, Hq, Dv]."""
        scale, sliding_window, softcap, sinks = maths
        kind = LayerKind(
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            qk_head_dim=q.shape[2],
            v_head_dim=v.shape[2],
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks is not None,
            ragged=True,
            causal=causal,
            layer_ids=(0,),
        )
        backend = self._backend(kind, q)
        layer = AttentionLayer.of_kind(kind, 0, sinks=sinks) if sinks is not None else self._layer(kind)
        out = backend.forward_ragged(
            q, k, v, layer,
            query_start_loc=lengths.query_start_loc,
            key_start_loc=lengths.key_start_loc,
            max_query_len=lengths.max_query_len,
            max_key_len=lengths.max_key_len,
            causal=causal,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def _layer(self, kind: LayerKind) -> AttentionLayer:
        if kind not in self._layers:
            self._layers[kind] = AttentionLayer.of_kind(kind, 0)
        return self._layers[kind]

    def _backend(self, kind: LayerKind, query: Tensor) -> AttentionBackend:
        """What was planned for ``kind`` in the dtype and on the device of ``query``."""
        key = kind, query.dtype, query.device
        if key not in self._built:
            config = AttentionConfig(layers=(kind,), dtype=dtype_name(query.dtype))
            with planned_by(INSTEAD):
                made = settle(plan(config, self._name, system=system_of(query.device.type), phases=("prefill",)))
                self._built[key] = build(made, _no_cache(made.config, query.device)), kind
        return self._built[key][0]


def _no_cache(config: AttentionConfig, device: torch.device) -> KVCache:
    """A cache that nothing is kept in: a backend is built over one, and ragged layers have none."""
    assert config.page_size is not None
    assert config.kv_layout is not None
    pages = torch.zeros(2, config.page_size, config.page_size, 1, device=device, dtype=getattr(torch, config.dtype))
    return KVCache({0: pages}, {0: pages}, page_size=config.page_size, layout=config.kv_layout)
