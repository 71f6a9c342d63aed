"""One layer's cache as the library takes it, and the same memory as pages of one token."""

from __future__ import annotations

from typing import NamedTuple

from attn_core.errors import ConfigError
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor


class Pools(NamedTuple):
    """k [pages, page, Hkv, D], v [pages, page, Hkv, Dv], by strides: NHD, HND and an engine's views alike.

    MLA: the keys are the rotary part of the latent rows, the values the rest, which ``qv`` is multiplied with.
    """

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, cache: KVCache, layer: AttentionLayer) -> Pools:
        """The layer's own."""
        k, v = cache.k_nhd(layer.layer_id), cache.v_nhd(layer.layer_id, layer.v_head_dim)
        return cls(k[..., layer.v_head_dim :], v) if layer.kind == "mla" else cls(k, v)

    @property
    def page_stride(self) -> int:
        """Slots from one page to the next."""
        return self.k.stride(0) // self.k.stride(1)

    def as_slots(self) -> Pools:
        """[slots, 1, Hkv, D]; pages begin `page_stride` slots apart. Raises ConfigError if no slot numbering fits."""
        return Pools(_as_slots(self.k), _as_slots(self.v))


def _as_slots(pool: Tensor) -> Tensor:
    page, token, head, _ = pool.stride()
    if page % token:
        raise ConfigError(
            f"pages {page} elements apart, tokens {token}: no slot numbering fits",
            accepted="pages a whole number of tokens apart, for tree verify",
        )
    count = (pool.shape[0] - 1) * (page // token) + pool.shape[1]
    return pool.as_strided((count, 1, *pool.shape[2:]), (token, token, head, 1), pool.storage_offset())
