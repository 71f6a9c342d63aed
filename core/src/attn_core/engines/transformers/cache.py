"""PagedCache: what `model.generate` takes for its cache; pages, their sharing and the steps of a backend are inside."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from attn_core.engines.refusals import planned_by
from attn_core.engines.transformers.encoder import EncoderPages
from attn_core.engines.transformers.masks import Spans, StepMask, mask_of
from attn_core.engines.transformers.names import INSTEAD, backend_of, implementation_of
from attn_core.engines.transformers.packing import Packing
from attn_core.engines.transformers.planning import encoder_len, plan_cached
from attn_core.engines.transformers.requests import RequestPages
from attn_core.errors import BatchError, ConfigError
from attn_core.generate.attention import PagedStep, PlannedLayers
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build, settle
from attn_core.runtime.kv_cache import KVCache


@dataclass(slots=True)
class Update:
    """What a layer has handed to its cache and not yet asked attention for."""

    cache: PagedCache
    layer_idx: int
    #: None where a cross layer asks for what its first pass wrote
    keys: Tensor | None
    values: Tensor | None


#: the attribute of a cross layer's stub that says whose it is
_STUB_OF: Final = "attn_update"


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
        return getattr(key, _STUB_OF, None)
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
    phase `verify`. Cross layers keep their encoder's keys in the same pool.
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
        max_images: int = 1,
    ) -> None:
        """Room for ``max_batch_size`` requests of ``max_seq_len`` tokens; ``backend`` None is the model's own.

        ``max_images`` counts the images of a request, for models with cross layers.
        Raises ConfigError for a model that cannot be served or that has another attn_implementation, and what ``plan``
        and ``build`` raise.
        """
        own = backend_of(model.config.get_text_config()._attn_implementation)
        if own is None or backend not in (None, own):
            raise ConfigError(
                f"a PagedCache for a model with attn_implementation {model.config._attn_implementation!r}",
                accepted=f"{implementation_of(backend or 'auto')!r}, after attn_core.engines.transformers.register()",
            )
        self.backend_name = own
        #: made by generate(), which may ask it to hold more than at first
        self.grows = False
        self._draft_tokens = max_draft_tokens
        self._images = max_images
        self._room = max_batch_size, max_seq_len
        count = self._open(model, page_size=page_size, kv_layout=None)
        self._requests = RequestPages(count, self.kv_cache.page_size, self._copy_page)
        self._encoder = EncoderPages(self._requests)
        kinds = self.plan.config.cached_kinds
        self.latent = any(kind.kind == "mla" for kind in kinds)
        #: layers that cache keys as they attend to them: neither a latent nor an encoder's
        self._keyed = frozenset(i for kind in kinds if kind.kind != "mla" and not kind.cross for i in kind.layer_ids)
        self.cross_layers = frozenset(i for kind in kinds if kind.cross for i in kind.layer_ids)
        self._first = min(i for kind in kinds if not kind.cross for i in kind.layer_ids)
        self._step: tuple[PagedStep, Packing] | None = None
        self._spans: Spans | None = None
        #: of plain decode steps
        self._single: Packing | None = None
        #: the plain decode step that is under way, the mask that was looked at and the window of the layer that had it
        self._plain: tuple[PagedStep, Any, int | None] | None = None
        super().__init__(layers=[self._layer(i) for i in range(max(self.kv_cache.layer_ids) + 1)])

    def _open(self, model: Any, *, page_size: int | None, kv_layout: str | None) -> int:
        """Plan and make a pool with room for what was asked for; gives its number of pages."""
        batch_size, seq_len = self._room
        with planned_by(INSTEAD):
            self.plan = settle(
                plan_cached(
                    model, self.backend_name, max_draft_tokens=self._draft_tokens, page_size=page_size,
                    kv_layout=kv_layout, max_context_len=seq_len,
                )
            )  # fmt: skip
        config = self.plan.config
        assert config.page_size is not None
        lens = seq_len, encoder_len(model.config, self._images)
        # one page more for each request: the last page of a beam is copied before its first one is given back
        count = 1 + batch_size * (1 + sum(-(-length // config.page_size) for length in lens))
        self.kv_cache = KVCache.allocate(config, num_pages=count, device=model.device)
        with planned_by(INSTEAD):
            self.backend = build(self.plan, self.kv_cache)
        self.planned = PlannedLayers(config)
        return count

    def make_room(self, model: Any, *, max_batch_size: int, max_seq_len: int) -> None:
        """Move into a pool that holds this much, if this one does not: at least twice as long, as it happens again."""
        batch_size, seq_len = self._room
        if max_batch_size <= batch_size and max_seq_len <= seq_len:
            return
        self._room = (
            max(batch_size, max_batch_size),
            seq_len if max_seq_len <= seq_len else max(max_seq_len, 2 * seq_len),
        )
        before = self.kv_cache
        count = self._open(model, page_size=before.page_size, kv_layout=before.layout)
        moved = self._requests.move(count, self._encoder.pages)
        if moved:
            source, target = (torch.tensor(ids, device=before.device) for ids in (list(moved), list(moved.values())))
            for layer_id in before.layer_ids:
                for old, new in zip(_tensors(before, layer_id), _tensors(self.kv_cache, layer_id), strict=True):
                    new[target] = old[source]

    def begins(self, layer_idx: int) -> bool:
        """Whether this layer's attention call begins a step, whose columns are not counted yet."""
        return layer_idx == self._first

    @property
    def columns(self) -> int:
        """Columns so far, padding among them."""
        return self._requests.columns

    @property
    def pages_in_use(self) -> int:
        """Pages that requests hold, a shared one counted once."""
        return self._requests.in_use

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer calls; the same as the update of ``layers[layer_idx]``."""
        if layer_idx not in self._keyed:
            layer = self.layers[layer_idx]
            assert isinstance(layer, PagedLayer)
            return layer.update(key_states, value_states)
        if layer_idx == self._first:
            self._step = self._plain = None
        _pending.update = Update(self, layer_idx, key_states, value_states)
        return key_states, value_states

    def accept(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values, [B, H, Q, D]; its attention call follows and gets what is given here.

        For a latent cache the model expands keys from that, which nobody reads: one column of them is enough.
        """
        if layer_idx == self._first:
            self._step = self._plain = None
        _pending.update = Update(self, layer_idx, keys, values)
        if layer_idx in self.cross_layers:
            self._encoder.accept(keys)
        return (keys[:, :, :1], values[:, :, :1]) if self.latent else (keys, values)

    def plain_decode(self, layer_idx: int, query: Tensor, attention_mask: Any, window: int | None) -> PagedStep | None:
        """The step under way, or the one that this layer begins, if it is plain; None where more is to be looked at.

        Plain: one token a request, none of them padded, and a mask that says no more than causality and the layer's own
        window.
        """
        if layer_idx != self._first:
            plain = self._plain
            return plain[0] if plain is not None and plain[1] is attention_mask and plain[2] == window else None
        if attention_mask is not None or window is not None:
            mask = mask_of(attention_mask)
            if mask is None or mask.window != window or mask.valid is not None or mask.dense is not None:
                return None
        batch_size, _, length, _ = query.shape
        batch = self._requests.next_decode(batch_size, query.device) if length == 1 else None
        if batch is None:
            return None
        if self._single is None or self._single.batch_size != batch_size:
            self._single = Packing(batch_size, 1, None, query.device)
        step = self._start(batch, 1, None)
        self._step, self._spans, self._plain = (step, self._single), None, (step, attention_mask, window)
        return step

    def step(
        self, update: Update, query: Tensor, mask: StepMask | None, window: int | None
    ) -> tuple[PagedStep, Packing]:
        """The step that ``update`` and query [B, Hq, Q, D] belong to; its first layer begins it.

        Raises BatchError for masks that contradict what was cached, CacheFullError for more tokens than were asked for.
        """
        if mask is not None and not mask.causal and mask.q_length > 1:
            raise ConfigError(
                "a model whose tokens see later ones, over pages",
                accepted="a forward pass with use_cache=False, whose keys are given",
                hint="what is cached was computed without the tokens that come later",
            )
        spans = None if mask is None or mask.dense is None else mask.spans(window)
        if update.layer_idx == self._first:
            self._step = self._begin(query, mask, spans)
            self._spans = spans
        if self._step is None:
            raise BatchError(f"a pass that begins at layer {update.layer_idx}", accepted=f"layer {self._first} first")
        if spans != self._spans and update.layer_idx not in self.cross_layers:
            raise ConfigError(
                f"layer {update.layer_idx} has spans {spans}, the first layer {self._spans}",
                accepted="the same tokens that see each other in every layer",
            )
        return self._step

    def _begin(self, query: Tensor, mask: StepMask | None, spans: Spans | None) -> tuple[PagedStep, Packing]:
        requests = self._requests
        batch_size, _, length, _ = query.shape
        valid = requests.columns_after(batch_size, length, None if mask is None else mask.valid)
        packing = Packing(batch_size, length, valid, query.device)
        before = requests.seq_lens()
        seq_lens = [n + new for n, new in zip(before, packing.lens, strict=True)]
        requests.reserve(seq_lens, packing.lens)
        mode = self._mode(packing.lens, before)
        if mode is ForwardMode.DECODE and spans is None:
            batch = requests.decode_batch(seq_lens, query.device)
        else:
            batch = ForwardBatch.build(
                mode,
                query_lens=packing.lens,
                seq_lens=seq_lens,
                pages=requests.pages,
                page_size=requests.page_size,
                device=query.device,
                spans=spans,
            )
        return self._start(batch, length, valid), packing

    def _start(self, batch: ForwardBatch, length: int, valid: Tensor | None) -> PagedStep:
        self.backend.init_forward_metadata(batch)
        self._requests.append(length, valid)
        if self.cross_layers:
            self._encoder.begin()
        return PagedStep(self.planned, self.backend, batch)

    def cross_batch(self, mask: Any) -> ForwardBatch:
        """The batch of the cross layers of this pass; ``mask`` [B, 1, Q, S] says which keys a token sees, or None."""
        assert self._step is not None
        step, packing = self._step
        return self._encoder.batch(step, packing, mask)

    def _mode(self, query_lens: list[int], before: list[int]) -> ForwardMode:
        longest, shortest = max(query_lens), min(query_lens)
        if longest == shortest == 1:
            return ForwardMode.DECODE
        chain = min(before) > 0 and shortest == longest <= self._draft_tokens
        return ForwardMode.TARGET_VERIFY if chain else ForwardMode.EXTEND

    def _copy_page(self, page: int, to: int) -> None:
        for layer_id in self.kv_cache.layer_ids:
            for tensor in _tensors(self.kv_cache, layer_id):
                tensor[to].copy_(tensor[page])

    # -- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, of any layer."""
        return self._requests.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many columns the next step's masks have, and where they begin."""
        return self._requests.columns + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns. Raises ConfigError for a positive number."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.columns:
            raise ConfigError(
                f"crop({tokens_to_remove}) of {self.columns} columns", accepted="minus the number of columns to remove"
            )
        self._requests.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Request i goes on from what request ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these requests, in this order; one may be named twice."""
        chosen = indices.tolist()
        self._requests.select(chosen)
        self._encoder.select(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every request ``repeats`` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty, as at first."""
        self._encoder.reset()
        self._requests.reset()
        self._step = None

    @property
    def batch_size(self) -> int:
        return len(self._requests.pages)

    @property
    def is_initialized(self) -> bool:
        return bool(self.columns)

    def _layer(self, layer_idx: int) -> PagedLayer:
        return (CrossLayer if layer_idx in self.cross_layers else PagedLayer)(self, layer_idx)


class PagedLayer(CacheLayerMixin):
    """One layer of a PagedCache, as transformers sees it."""

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: PagedCache, layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer_idx = layer_idx
        self.is_initialized = True
        self.keys = self.values = torch.zeros(0)  # asked for their size by models with cross layers

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


class CrossLayer(PagedLayer):  # type: ignore[no-untyped-call]
    """A cross layer: the model asks whether it holds its encoder's keys, and takes them from ``keys`` if so.

    What it finds there is a stub that says whose it is; the keys are in pages.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = super().update(key_states, value_states)
        self.keys = self.values = key_states.new_zeros(1)
        setattr(self.keys, _STUB_OF, Update(self._cache, self._layer_idx, None, None))
        return given

    def reset(self) -> None:
        self.keys = self.values = torch.zeros(0)


def _tensors(cache: KVCache, layer_id: int) -> list[Tensor]:
    """The layer's tensors: keys and values, or the latent alone."""
    return [tensor for tensor in (cache.k(layer_id), cache.v(layer_id)) if tensor is not None]
