"""The paged KV cache: KVCache (own tensors or an engine's, MHA and MLA) and PageAllocator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from attn_core.errors import CacheFullError, ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind, check_page_size
from attn_core.runtime.layer import AttentionLayer

TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
FP8_DTYPES: Final = (torch.float8_e4m3fn, torch.float8_e5m2)


def cache_dtype(config: AttentionConfig) -> torch.dtype:
    """The dtype that the cache of ``config`` stores."""
    return TORCH_DTYPES[config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype]


class KVCache:
    """Keys and values of every cached layer, in pages. Page 0 is the null page: it may hold anything, nobody reads it.

    Layouts of one layer's tensors: NHD [pages, page_size, Hkv, D], HND [pages, Hkv, page_size, D],
    MLA one tensor [pages, page_size, kv_lora_rank + rope] whose values are the first kv_lora_rank of a row.
    Strides are free, but for the last dimension, which is contiguous: an engine's views are wrapped without a copy.
    """

    def __init__(self, k: Mapping[int, Tensor], v: Mapping[int, Tensor | None], *, page_size: int, layout: str) -> None:
        """Wrap tensors by layer id; ``v[i]`` is None for MLA. Raises ConfigError for shapes that do not fit."""
        self.page_size = check_page_size(page_size)
        self.layout = layout
        self._k = dict(k)
        self._v = dict(v)
        if not self._k or set(self._k) != set(self._v):
            raise ConfigError(
                f"layers with keys {sorted(self._k)}, with values {sorted(self._v)}",
                accepted="the same layers, at least one",
            )
        for layer_id, key in self._k.items():
            _check_tensor(layer_id, "k", key, layout, page_size)
            value = self._v[layer_id]
            if (value is None) != (layout == "MLA"):
                raise ConfigError(f"layer {layer_id}: layout {layout} with v {'missing' if value is None else 'given'}")
            if value is not None:
                _check_tensor(layer_id, "v", value, layout, page_size)
        first = next(iter(self._k.values()))
        self.num_pages = first.shape[0]
        self.dtype = first.dtype
        self.device = first.device

    @classmethod
    def allocate(cls, config: AttentionConfig, *, num_pages: int, device: torch.device | str = "cpu") -> KVCache:
        """Zeroed pools for every cached layer of ``config``, whose page_size and kv_layout are decided (plan.config).

        ``num_pages`` counts the null page.
        """
        if config.page_size is None or config.kv_layout is None:
            raise ConfigError("a cache needs a page size and a layout", hint="take plan.config, where both are decided")
        if num_pages < 2:
            raise ConfigError(f"num_pages is {num_pages}", accepted="at least 2: the null page and one more")
        k: dict[int, Tensor] = {}
        v: dict[int, Tensor | None] = {}
        for kind in config.cached_kinds:
            for layer_id in kind.layer_ids or (0,):
                k[layer_id] = torch.zeros(
                    _shape(kind, "k", config.kv_layout, num_pages, config.page_size),
                    dtype=cache_dtype(config),
                    device=device,
                )
                v[layer_id] = (
                    None
                    if kind.kind == "mla"
                    else torch.zeros(
                        _shape(kind, "v", config.kv_layout, num_pages, config.page_size),
                        dtype=cache_dtype(config),
                        device=device,
                    )
                )
        return cls(k, v, page_size=config.page_size, layout=config.kv_layout)

    @staticmethod
    def bytes_per_page(config: AttentionConfig) -> int:
        """Bytes that one page takes over all cached layers of ``config``."""
        if config.page_size is None:
            raise ConfigError("bytes of a page of unknown size", hint="take plan.config, where it is decided")
        width = sum(
            max(1, len(kind.layer_ids))
            * kind.num_kv_heads
            * (kind.qk_head_dim + (0 if kind.kind == "mla" else kind.v_head_dim))
            for kind in config.cached_kinds
        )
        return width * config.page_size * cache_dtype(config).itemsize

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return tuple(self._k)

    def k(self, layer_id: int) -> Tensor:
        """The layer's keys in the cache's layout; MLA: the latent rows."""
        return self._k[layer_id]

    def v(self, layer_id: int) -> Tensor | None:
        """The layer's values in the cache's layout; None for MLA."""
        return self._v[layer_id]

    def k_nhd(self, layer_id: int) -> Tensor:
        """The layer's keys as a view [pages, page_size, Hkv, D], whatever the layout (MLA: Hkv = 1)."""
        return _as_nhd(self._k[layer_id], self.layout)

    def v_nhd(self, layer_id: int, v_head_dim: int | None = None) -> Tensor:
        """The layer's values as a view [pages, page_size, Hkv, Dv]; MLA: the first ``v_head_dim`` of the latent row."""
        value = self._v[layer_id]
        if value is None:
            return _as_nhd(self._k[layer_id], self.layout)[..., :v_head_dim]
        return _as_nhd(value, self.layout)

    def write(self, layer: AttentionLayer, slot_mapping: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Store k [T, Hkv, Dk] and v [T, Hkv, Dv] (None for MLA) at ``slot_mapping`` [T]; a slot of -1 is not written.

        An fp8 cache stores value / scale, saturated. No host synchronisation: a row of -1 rewrites slot 0, which lies
        in the null page, with what is there.
        """
        skip = (slot_mapping < 0)[:, None, None]
        slots = slot_mapping.clamp(min=0)
        page, offset = slots // self.page_size, slots % self.page_size
        _scatter(self.k_nhd(layer.layer_id), page, offset, skip, k, layer.k_scale)
        value = self._v[layer.layer_id]
        if value is not None and v is not None:
            _scatter(_as_nhd(value, self.layout), page, offset, skip, v, layer.v_scale)

    def with_page_size(self, page_size: int) -> KVCache:
        """The same memory seen in smaller pages: page p of n tokens becomes pages p*r to p*r+r-1, r = n / page_size.

        Raises ConfigError for HND (its heads lie between the tokens of a page) and for sizes that do not divide.
        """
        ratio, rest = divmod(self.page_size, page_size)
        if rest or self.layout == "HND":
            raise ConfigError(
                f"a {self.layout} cache of pages of {self.page_size} seen in pages of {page_size}",
                accepted=f"NHD or MLA, and a divisor of {self.page_size}",
            )
        split = {i: _split_pages(t, ratio) for i, t in self._k.items()}
        split_v = {i: None if t is None else _split_pages(t, ratio) for i, t in self._v.items()}
        return KVCache(split, split_v, page_size=page_size, layout=self.layout)


class PageAllocator:
    """Hands out page ids 1 to num_pages - 1, with a reference count each, so that requests may share a prefix."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ConfigError(f"num_pages is {num_pages}", accepted="at least 2: the null page and one more")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one reference each. Raises CacheFullError, and then takes none."""
        if count > len(self._free):
            raise CacheFullError(
                f"{count} pages wanted, {len(self._free)} of {self.num_pages - 1} are free",
                given=count,
                hint="a larger cache, shorter prompts, or fewer requests at once",
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of these pages in use."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each; a page without any is free again."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free already"
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def references(self, page: int) -> int:
        """How many hold this page."""
        return self._references[page]


def _shape(kind: LayerKind, which: str, layout: str, num_pages: int, page_size: int) -> Sequence[int]:
    dim = kind.qk_head_dim if which == "k" else kind.v_head_dim
    if (layout == "MLA") != (kind.kind == "mla"):
        raise ConfigError(f"layout {layout} for {kind.kind} layers", accepted="MLA for mla, NHD or HND for mha")
    if layout == "MLA":
        return (num_pages, page_size, dim)
    if layout == "NHD":
        return (num_pages, page_size, kind.num_kv_heads, dim)
    return (num_pages, kind.num_kv_heads, page_size, dim)


def _check_tensor(layer_id: int, name: str, tensor: Tensor, layout: str, page_size: int) -> None:
    dims, token_dim = {"NHD": (4, 1), "HND": (4, 2), "MLA": (3, 1)}.get(layout, (0, 0))
    if not dims:
        raise ConfigError(f"layout {layout!r}", given=layout, accepted=("NHD", "HND", "MLA"))
    if tensor.dim() != dims or tensor.shape[token_dim] != page_size or tensor.stride(-1) != 1:
        raise ConfigError(
            f"layer {layer_id}: {name} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            f" as {layout} pages of {page_size}",
            accepted="NHD [pages, page_size, Hkv, D], HND [pages, Hkv, page_size, D], MLA [pages, page_size, D];"
            " last stride 1",
        )


def _as_nhd(tensor: Tensor, layout: str) -> Tensor:
    if layout == "NHD":
        return tensor
    return tensor.transpose(1, 2) if layout == "HND" else tensor.unsqueeze(2)


def _split_pages(tensor: Tensor, ratio: int) -> Tensor:
    """[pages, n, ...] as [pages * ratio, n / ratio, ...] without a copy; pages must follow each other in memory."""
    pages, tokens = tensor.shape[:2]
    if pages > 1 and tensor.stride(0) != tokens * tensor.stride(1):
        raise ConfigError(
            f"pages of strides {tensor.stride()} cannot be seen in smaller pages",
            accepted="pages that follow each other in memory",
        )
    shape = (pages * ratio, tokens // ratio, *tensor.shape[2:])
    return tensor.as_strided(
        shape, ((tokens // ratio) * tensor.stride(1), *tensor.stride()[1:]), tensor.storage_offset()
    )


def _scatter(pool: Tensor, page: Tensor, offset: Tensor, skip: Tensor, rows: Tensor, scale: float) -> None:
    """pool [pages, page_size, H, D] at page, offset [T] becomes rows [T, H, D] / scale, saturated to the pool's dtype.

    Where ``skip`` [T, 1, 1] holds, page and offset are 0 and what is there stays.
    """
    if pool.dtype in FP8_DTYPES:
        limit = torch.finfo(pool.dtype).max
        rows = (rows.float() / scale).clamp(-limit, limit).to(pool.dtype).view(torch.uint8)
        pool = pool.view(torch.uint8)
    else:
        rows = rows.to(pool.dtype)
    pool[page, offset] = torch.where(skip, pool[0, 0], rows)
