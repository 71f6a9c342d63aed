"""Reading keys and values out of the pages that requests name, and nothing else, whatever the strides of the pool."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer


def read_tokens(
    kv_cache: KVCache, layer: AttentionLayer, page_ids: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Keys [S, Hkv, D] and values [S, Hkv, Dv] of tokens ``start`` to ``stop - 1`` of the request in ``page_ids`` [n].

    Only pages that hold such a token are read, and only their rows.
    """
    size = kv_cache.page_size
    first = start // size
    ids = page_ids[first : -(-stop // size)]
    rows = slice(start - first * size, stop - first * size)
    k = dequantize(gather_pages(kv_cache.k_nhd(layer.layer_id), ids).flatten(0, 1)[rows], layer.k_scale)
    if layer.kind == "mla":
        return k, k[..., : layer.v_head_dim]
    v = gather_pages(kv_cache.v_nhd(layer.layer_id), ids).flatten(0, 1)[rows]
    return k, dequantize(v, layer.v_scale)


def gather_pages(pool: Tensor, ids: Tensor) -> Tensor:
    """The pages ``ids`` (any shape) of pool [pages, page_size, H, D]; fp8 is copied as bytes: every device can."""
    if pool.dtype in FP8_DTYPES:
        return pool.view(torch.uint8)[ids].view(pool.dtype)
    return pool[ids]


def dequantize(rows: Tensor, scale: float) -> Tensor:
    """fp8 rows times their scale in fp32; other dtypes as they are, unless they are scaled."""
    if rows.dtype in FP8_DTYPES:
        return fp8_to_float(rows).mul_(scale)
    return rows if scale == 1.0 else rows.float() * scale


def fp8_to_float(rows: Tensor) -> Tensor:
    """fp8 as fp32, exactly. On a CPU torch's own conversion of e4m3 is five times slower than looking the byte up."""
    if rows.device.type != "cpu" or rows.dtype is not torch.float8_e4m3fn:
        return rows.float()
    return _e4m3_values()[rows.view(torch.uint8).int()]


@cache
def _e4m3_values() -> Tensor:
    """[256] fp32: what each byte means."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class RowTable:
    """A pool [pages, page_size, H, D] of any strides as a table of rows.

    ``rows`` [N, D] is a view; ``page``, ``token``, ``head`` are how many rows lie from one to the next. ``contiguous``
    says that the rows do not overlap, which ``embedding_bag`` needs in order not to copy the pool.
    """

    rows: Tensor
    page: int
    token: int
    head: int
    heads: int
    contiguous: bool

    @classmethod
    def of(cls, pool: Tensor) -> RowTable:
        if pool.dtype in FP8_DTYPES:
            pool = pool.view(torch.uint8)
        pages, tokens, heads, dim = pool.shape
        strides = pool.stride()[:3]
        step = math.gcd(*strides, dim)
        last = sum((n - 1) * stride for n, stride in zip((pages, tokens, heads), strides, strict=True))
        rows = pool.as_strided((last // step + 1, dim), (step, 1))
        page, token, head = (stride // step for stride in strides)
        return cls(rows, page, token, head, heads, contiguous=step == dim)

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """Tables of one layout have the same index for the same slots."""
        return self.page, self.token, self.head, self.heads

    def index(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """[n, H, w] int64: the rows of tokens at ``offsets`` [n, w] of ``pages`` [n, w]."""
        first = pages.long() * self.page + offsets * self.token
        return first[:, None] + torch.arange(self.heads, device=pages.device)[:, None] * self.head
