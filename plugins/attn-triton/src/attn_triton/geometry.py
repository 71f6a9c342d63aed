"""What the kernels are compiled for: one layer's dimensions, dtypes and strides, as frozen facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from attn_core.errors import ConfigError
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer


def power_of_two_from(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


#: Least width of a part of a tile that is widened from fp8 to 16 bits: what fills a row of 128 bytes. Keys and values
#: then lie in shared memory with one swizzle. With two, ptxas 12.8 (Triton 3.6's) reads a register that nothing wrote
#: when it makes the second descriptor of the place that both take in turn, and the tensor cores read anywhere
#: (TUNING.md).
WIDENED_PART = 64


def split_width(width: int, least: int = 16) -> tuple[int, int]:
    """A head width as one or two powers of two, from ``least``, that hold it: 128 is (128, 0), 96 (64, 32), 576 (512,
    64), 80 (64, 16).

    Tensor cores want powers of two; padding 576 to 1024 would read almost twice the bytes.
    """
    first = max(least, 1 << (width.bit_length() - 1))
    if first >= width:
        return first, 0
    second = max(least, power_of_two_from(width - first))
    return (first, second) if second < first or first == 16 else (first * 2, 0)


@dataclass(frozen=True, slots=True)
class Strides:
    """Elements from page to page, token to token and head to head of one pool, its last stride being 1."""

    page: int
    token: int
    head: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """A layer as the kernels see it. Widths in elements; ``page_size`` 0: keys are given, not paged (strides.page
    unused). ``aligned``: every row of both pools begins at a multiple of 16 bytes.
    """

    num_kv_heads: int
    group: int
    qk_dim: int
    v_dim: int
    values_in_keys: bool
    page_size: int
    k: Strides
    v: Strides
    dtype: torch.dtype
    kv_dtype: torch.dtype
    aligned: bool = True

    @classmethod
    def of_cache(cls, layer: AttentionLayer, cache: KVCache, dtype: torch.dtype) -> Geometry:
        """Of a layer in the paged cache, queries of ``dtype``. Raises ConfigError for a cache that the layer does not
        fit.
        """
        k = cache.k_nhd(layer.layer_id)
        mla = layer.kind == "mla"
        v = k if mla else cache.v_nhd(layer.layer_id)
        wanted = (
            layer.num_kv_heads,
            layer.qk_head_dim,
            layer.num_kv_heads,
            layer.qk_head_dim if mla else layer.v_head_dim,
        )
        given = (k.shape[2], k.shape[3], v.shape[2], v.shape[3])
        if given != wanted:
            raise ConfigError(
                f"layer {layer.layer_id}: the cache holds (heads, width) {given[:2]} and {given[2:]}",
                accepted=f"{wanted[:2]} and {wanted[2:]}, as the layer says",
            )
        return cls(
            num_kv_heads=layer.num_kv_heads,
            group=layer.group_size,
            qk_dim=layer.qk_head_dim,
            v_dim=layer.v_head_dim,
            values_in_keys=mla,
            page_size=cache.page_size,
            k=_strides(k),
            v=_strides(v),
            dtype=dtype,
            kv_dtype=k.dtype,
            aligned=_aligned(k) and _aligned(v),
        )

    @classmethod
    def of_rows(cls, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> Geometry:
        """Of keys [S, Hkv, D] and values [S, Hkv, Dv] that are given."""
        return cls(
            num_kv_heads=layer.num_kv_heads,
            group=layer.group_size,
            qk_dim=layer.qk_head_dim,
            v_dim=layer.v_head_dim,
            values_in_keys=False,
            page_size=0,
            k=Strides(0, k.stride(0), k.stride(1)),
            v=Strides(0, v.stride(0), v.stride(1)),
            dtype=dtype,
            kv_dtype=k.dtype,
        )

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def _least_part(self) -> int:
        return WIDENED_PART if self.kv_dtype.itemsize < self.dtype.itemsize == 2 else 16

    @property
    def k_parts(self) -> tuple[int, int]:
        return split_width(self.qk_dim, self._least_part)

    @property
    def v_parts(self) -> tuple[int, int]:
        """Widths of the two accumulators. Values that lie in the keys take the keys' parts, as far as they reach."""
        if self.values_in_keys:
            first, second = self.k_parts
            return first, second if self.v_dim > first else 0
        return split_width(self.v_dim, self._least_part)

    @property
    def width(self) -> int:
        """The wider of keys and values, as tiles hold them."""
        return max(sum(self.k_parts), sum(self.v_parts))

    @property
    def key_bytes(self) -> int:
        """Bytes of one key and its value in a tile, both as the dot takes them (an fp8 tile is widened)."""
        width = sum(self.k_parts) + (0 if self.values_in_keys else sum(self.v_parts))
        return width * max(self.dtype.itemsize, self.kv_dtype.itemsize)

    @property
    def fp8_limit(self) -> float:
        """The largest number of the cache's dtype if it is fp8, else 0."""
        return torch.finfo(self.kv_dtype).max if self.kv_dtype in FP8_DTYPES else 0.0

    def pool_constants(self) -> dict[str, Any]:
        """The constexprs of a paged pool that every kernel over the cache takes."""
        return {
            "PAGE": self.page_size or 1,
            "K_PAGE": self.k.page,
            "K_TOKEN": self.k.token,
            "K_HEAD": self.k.head,
            "V_PAGE": self.v.page,
            "V_TOKEN": self.v.token,
            "V_HEAD": self.v.head,
        }

    def head_constants(self) -> dict[str, Any]:
        """The constexprs of the attention kernels that follow from the head sizes and the queries' dtype."""
        (d0, d1), (v0, v1) = self.k_parts, self.v_parts
        return {
            "HKV": self.num_kv_heads,
            "GROUP": self.group,
            "D": self.qk_dim,
            "D0": d0,
            "D1": d1,
            "DV": self.v_dim,
            "V0": v0,
            "V1": v1,
            "V_IN_K": self.values_in_keys,
            "HALF": self.kv_dtype in FP8_DTYPES and self.dtype == torch.bfloat16,
        }


def _strides(nhd: torch.Tensor) -> Strides:
    page, token, head, _ = nhd.stride()
    return Strides(page, token, head)


def _aligned(nhd: torch.Tensor) -> bool:
    places = [nhd.data_ptr(), *(stride * nhd.element_size() for stride in nhd.stride()[:3])]
    return not any(place % 16 for place in places)
