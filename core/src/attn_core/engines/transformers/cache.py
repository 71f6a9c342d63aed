"""PagedCache: what `model.generate` takes for its cache; pages, their sharing and the steps of a backend are inside."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from attn_core.engines.transformers.masks import StepMask
from attn_core.engines.transformers.names import backend_of, implementation_of
from attn_core.engines.transformers.packing import Packing
from attn_core.engines.transformers.planning import plan_cached
from attn_core.errors import BatchError, CacheFullError, ConfigError
from attn_core.generate.attention import PagedStep, PlannedLayers
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build, settle
from attn_core.runtime.kv_cache import KVCache, PageAllocator


@dataclass(slots=True)
class Update:
    """What a layer has handed to its cache and not yet asked attention for."""

    cache: PagedCache
    layer_idx: int
    keys: Tensor
    values: Tensor


class _Pending(threading.local):
    update: Update | None = None


#: transformers hands the cache to the layer and not to its attention function: the last update says whose it is
_pending = _Pending()


def take_update(layer_idx: int | None, key: Tensor) -> Update | None:
    """The update that an attention call over ``key`` belongs to, or None for a call without a PagedCache.

    Raises BatchError if a layer updated the cache and another one asks.
    """
    update, _pending.update = _pending.update, None
    if update is None:
        return None
    if update.layer_idx != layer_idx or not (update.cache.latent or key is update.keys):
        raise BatchError(
            f"layer {update.layer_idx} updated the cache, and layer {layer_idx} asks for attention over other keys",
            accepted="layers that attend right after they update their cache",
            hint="this model's code does something between the two that is not known; it cannot be served",
        )
    return update


class PagedCache(Cache):
    """The keys and values of a batch in pages, and the planned backends over them; for DeepSeek, the latent.

    It counts columns as transformers does, padding among them; pages hold tokens only. Beams share pages: one that is
    written to while another request holds it is copied first. Chains of up to ``max_draft_tokens`` guesses run as the
    phase `verify`.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int,
        max_seq_len: int,
        backend: str | None = None,
        page_size: int | None = None,
        max_draft_tokens: int = 0,
    ) -> None:
        """Room for ``max_batch_size`` requests of ``max_seq_len`` tokens; ``backend`` None is the model's own.

        Raises ConfigError for a model that cannot be served or that has another attn_implementation, and what ``plan``
        and ``build`` raise.
        """
        own = backend_of(model.config.get_text_config()._attn_implementation)
        self.backend_name = own if backend is None else backend
        if own is None or self.backend_name != own:
            raise ConfigError(
                f"a PagedCache for a model with attn_implementation {model.config._attn_implementation!r}",
                accepted=f"{implementation_of(backend or 'auto')!r}, after attn_core.engines.transformers.register()",
            )
        self.plan = settle(
            plan_cached(model, own, max_draft_tokens=max_draft_tokens, page_size=page_size, max_context_len=max_seq_len)
        )
        config = self.plan.config
        assert config.page_size is not None
        self._page_size = config.page_size
        self._draft_tokens = max_draft_tokens
        # one page more for each request: the last page of a beam is copied before its first one is given back
        count = 1 + max_batch_size * (-(-max_seq_len // config.page_size) + 1)
        self.kv_cache = KVCache.allocate(config, num_pages=count, device=model.device)
        self.backend = build(self.plan, self.kv_cache)
        self.latent = any(kind.kind == "mla" for kind in config.cached_kinds)
        self.planned = PlannedLayers(config)
        self._allocator = PageAllocator(count)
        self._pages: list[list[int]] = []
        self._valid = torch.zeros(0, 0, dtype=torch.bool)  # [B, columns], on the host
        self._first = min(self.kv_cache.layer_ids)
        self._step: tuple[PagedStep, Packing] | None = None
        super().__init__(layers=[PagedLayer(self, i) for i in range(max(self.kv_cache.layer_ids) + 1)])

    @property
    def columns(self) -> int:
        """Columns so far, padding among them."""
        return self._valid.shape[1]

    @property
    def pages_in_use(self) -> int:
        """Pages that requests hold, a shared one counted once."""
        return self._allocator.num_pages - 1 - self._allocator.num_free

    def accept(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values, [B, H, Q, D]; its attention call follows and gets what is given here.

        For a latent cache the model expands keys from that, which nobody reads: one column of them is enough.
        """
        if layer_idx == self._first:
            self._step = None
        _pending.update = Update(self, layer_idx, keys, values)
        return (keys[:, :, :1], values[:, :, :1]) if self.latent else (keys, values)

    def step(
        self, update: Update, query: Tensor, mask: StepMask | None, window: int | None
    ) -> tuple[PagedStep, Packing]:
        """The step that ``update`` and query [B, Hq, Q, D] belong to; its first layer begins it.

        Raises BatchError for masks that contradict what was cached, CacheFullError for more tokens than were asked for.
        """
        if update.layer_idx == self._first:
            self._step = self._begin(query, mask, window)
        if self._step is None:
            raise BatchError(f"a pass that begins at layer {update.layer_idx}", accepted=f"layer {self._first} first")
        return self._step

    def _begin(self, query: Tensor, mask: StepMask | None, window: int | None) -> tuple[PagedStep, Packing]:
        batch_size, length = query.shape[0], query.shape[2]
        valid = self._columns_after(batch_size, length, mask)
        packing = Packing(batch_size, length, None if bool(valid.all()) else valid, query.device)
        seq_lens = valid.sum(1).tolist()
        self._reserve(seq_lens, packing.lens)
        batch = ForwardBatch.build(
            self._mode(packing.lens, seq_lens),
            query_lens=packing.lens,
            seq_lens=seq_lens,
            pages=self._pages,
            page_size=self._page_size,
            device=query.device,
            spans=None if mask is None else mask.spans(window),
        )
        self.backend.init_forward_metadata(batch)
        self._valid = valid
        return PagedStep(self.planned, self.backend, batch), packing

    def _columns_after(self, batch_size: int, length: int, mask: StepMask | None) -> Tensor:
        """[B, columns] after this step. Raises BatchError where it contradicts the columns that are cached."""
        if not self.columns:
            self._pages = self._pages or [[] for _ in range(batch_size)]
            self._valid = torch.zeros(batch_size, 0, dtype=torch.bool)
        total = self.columns + length
        if batch_size != len(self._pages):
            raise BatchError(f"{batch_size} requests over a cache of {len(self._pages)}", accepted="the same requests")
        given = None if mask is None else mask.valid
        valid = torch.ones(batch_size, total, dtype=torch.bool) if given is None else given
        if valid.shape != (batch_size, total) or not torch.equal(valid[:, : self.columns], self._valid):
            raise BatchError(
                f"a mask of columns {tuple(valid.shape)} over {self.columns} cached and {length} new columns"
                " that differs from what was cached",
                accepted="the mask of the steps before, and the new columns after it",
            )
        return valid

    def _mode(self, query_lens: list[int], seq_lens: list[int]) -> ForwardMode:
        longest, before = max(query_lens), min(s - q for s, q in zip(seq_lens, query_lens, strict=True))
        if longest == min(query_lens) == 1:
            return ForwardMode.DECODE
        chain = before > 0 and min(query_lens) == longest
        return ForwardMode.TARGET_VERIFY if chain and longest <= self._draft_tokens else ForwardMode.EXTEND

    # -- pages

    def _reserve(self, seq_lens: list[int], query_lens: list[int]) -> None:
        """Pages for the new tokens of every request; a shared page that is written to becomes the request's own."""
        for pages, seq_len, new in zip(self._pages, seq_lens, query_lens, strict=True):
            first = (seq_len - new) // self._page_size
            for i in range(first, len(pages) if new else first):
                if self._allocator.references(pages[i]) > 1:
                    pages[i] = self._copied(pages[i])
            missing = -(-seq_len // self._page_size) - len(pages)
            if missing > 0:
                pages += self._take(missing)

    def _take(self, count: int) -> list[int]:
        try:
            return self._allocator.allocate(count)
        except CacheFullError as error:
            raise CacheFullError(
                f"the cache has room for {self._allocator.num_pages - 1} pages of {self._page_size} tokens, and all are"
                " in use",
                hint="PagedCache(max_seq_len=...), or let generate() make it",
            ) from error

    def _copied(self, page: int) -> int:
        (own,) = self._take(1)
        for layer_id in self.kv_cache.layer_ids:
            for tensor in (self.kv_cache.k(layer_id), self.kv_cache.v(layer_id)):
                if tensor is not None:
                    tensor[own].copy_(tensor[page])
        self._allocator.release([page])
        return own

    # -- what transformers asks of a cache

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns. Raises ConfigError for a positive number."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.columns:
            raise ConfigError(
                f"crop({tokens_to_remove}) of {self.columns} columns", accepted="minus the number of columns to remove"
            )
        self._valid = self._valid[:, : self.columns + tokens_to_remove]
        for pages, seq_len in zip(self._pages, self._valid.sum(1).tolist(), strict=True):
            keep = -(-seq_len // self._page_size)
            self._allocator.release(pages[keep:])
            del pages[keep:]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Request i goes on from what request ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these requests, in this order; one may be named twice."""
        chosen = indices.tolist()
        before = self._pages
        self._pages = [list(before[i]) for i in chosen]
        for pages in self._pages:
            self._allocator.share(pages)
        for pages in before:
            self._allocator.release(pages)
        self._valid = self._valid[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every request ``repeats`` times."""
        self.batch_select_indices(torch.arange(len(self._pages)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty, as at first."""
        for pages in self._pages:
            self._allocator.release(pages)
        self._pages = []
        self._valid = torch.zeros(0, 0, dtype=torch.bool)
        self._step = None

    @property
    def batch_size(self) -> int:
        return len(self._pages)

    @property
    def is_initialized(self) -> bool:
        return bool(self.columns)


class PagedLayer(CacheLayerMixin):
    """One layer of a PagedCache, as transformers sees it."""

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: PagedCache, layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer_idx = layer_idx
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages are there from the beginning."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.accept(self._layer_idx, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1
