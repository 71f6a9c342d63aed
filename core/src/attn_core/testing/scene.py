"""A case made real: the pool and its truth, the cache around it, and the steps with their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask, slots_of
from attn_core.runtime.kv_cache import FP8_DTYPES, TORCH_DTYPES, KVCache, cache_dtype
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.cases import Case, Request
from attn_core.testing.far import Site
from attn_core.testing.pages import Placement, place

#: Scales of an fp8 cache: no powers of two, and not each other.
K_SCALE: Final = 0.043
V_SCALE: Final = 0.029
#: How much larger the queries of a ``hot`` case are.
HOT: Final = 6.0
#: Waves of a case with the option ``steps``.
NUM_STEPS: Final = 3

_FORWARD_MODES: Final = {
    "extend": ForwardMode.EXTEND,
    "decode": ForwardMode.DECODE,
    "mixed": ForwardMode.MIXED,
    "verify": ForwardMode.TARGET_VERIFY,
    "draft_extend": ForwardMode.DRAFT_EXTEND,
}


@dataclass(slots=True, eq=False)
class Inputs:
    """What one forward of one layer is given; k and v are None when the cache has them."""

    layer: AttentionLayer
    q: Tensor
    k: Tensor | None
    v: Tensor | None


@dataclass(slots=True, eq=False)
class Step:
    """One batch, the inputs of its layers, and the requests it is of, by number.

    ``written``: the slots that the step must write, by layer. ``write_first``: those that `write_kv` writes before it.
    Both on the host, as the truth is.
    """

    batch: ForwardBatch
    inputs: list[Inputs]
    sequences: tuple[int, ...]
    written: dict[int, Tensor] = field(default_factory=dict)
    write_first: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Truth:
    """The keys and values of every slot of a layer, [slots, Hkv, D] in the working dtype on the host; v None for MLA.

    Slots are those of the placement, as its pages are: where they lie in the pool is the matter of the `Site`.
    ``junk`` is what the pool holds where no token lies: finite, and wrong.
    """

    k: Tensor
    v: Tensor | None
    junk_k: Tensor
    junk_v: Tensor | None


class Scene:
    """Everything a case needs but the backend: made from the case alone, the same on every device."""

    def __init__(self, case: Case, config: AttentionConfig, device: torch.device) -> None:
        self.case, self.config, self.device = case, config, device
        self.dtype = TORCH_DTYPES[config.dtype]
        self.page_size = case.page_size
        self._rng = torch.Generator().manual_seed(case.seed * 7919 + 17)
        self.sequences = self._sequences()
        self.placement, self.encoder_pages = self._place()
        self.site = Site.of(case, self.placement.num_pages)
        every = enumerate(case.kinds, case.first_layer)
        self.layers = [self._layer(kind, i) for i, kind in every if kind.ragged == (case.mode == "ragged")]
        self.truth = {layer.layer_id: self._truth(layer) for layer in self.layers} if case.mode != "ragged" else {}
        self.waves = self._waves()
        self._contents: dict[tuple[int, str, bool], Tensor] = {}

    # -- requests and pages

    def _sequences(self) -> list[Request]:
        copies = 2 if self.case.options & {"flight", "graph"} else 1
        return [*self.case.requests] * copies

    def _num_waves(self) -> int:
        return NUM_STEPS if "steps" in self.case.options else 2 if "graph" in self.case.options else 1

    def _place(self) -> tuple[Placement, tuple[tuple[int, ...], ...]]:
        """Pages for every sequence, with room for its later steps, and for every encoder."""
        page, more = self.page_size, self._num_waves() - 1
        own = [-(-(r.seq_len + more * r.new) // page) for r in self.sequences]
        encoders = [-(-r.encoder // page) for r in self.sequences]
        shareable = [r.prefix >= page for r in self.sequences] + [False] * len(encoders)
        placed = place([*own, *encoders], self.case.memory, shareable, self.case.seed)
        return placed, placed.pages[len(own) :]

    def slots(self, sequence: int, positions: range) -> list[int]:
        """The slots of these positions of a sequence."""
        return slots_of(self.placement.pages[sequence], positions, self.page_size)

    # -- layers and their data

    def _layer(self, kind: LayerKind, layer_id: int) -> AttentionLayer:
        sinks = None
        if kind.sinks:
            # values that bfloat16 holds exactly: a kernel may want them so
            sinks = self._random(kind.num_q_heads).bfloat16()
            sinks = (sinks if "sinks16" in self.case.options else sinks.float()).to(self.device)
        fp8 = cache_dtype(self.config) in FP8_DTYPES and not kind.ragged
        scales = {"k_scale": K_SCALE, "v_scale": V_SCALE} if fp8 else {}
        return AttentionLayer.of_kind(kind, layer_id, sinks=sinks, **scales)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._rng)

    def _rows(self, count: int, heads: int, width: int) -> Tensor:
        return self._random(count, heads, width).to(self.dtype)

    def _truth(self, layer: AttentionLayer) -> Truth:
        slots, heads = self.site.num_slots, layer.num_kv_heads
        k, junk_k = (self._rows(slots, heads, layer.qk_head_dim) for _ in range(2))
        if layer.kind == "mla":
            return Truth(k, None, junk_k, None)
        v, junk_v = (self._rows(slots, heads, layer.v_head_dim) for _ in range(2))
        stored = cache_dtype(self.config)
        if "hot" in self.case.options and stored in FP8_DTYPES:
            v[..., 0] *= 2 * torch.finfo(stored).max * V_SCALE  # larger than the cache can hold
        return Truth(k, v, junk_k, junk_v)

    def _queries(self, count: int, layer: AttentionLayer) -> Tensor:
        q = self._rows(count, layer.num_q_heads, layer.qk_head_dim)
        return (q * HOT if "hot" in self.case.options else q).to(self.device)

    # -- the cache

    def allocate(self) -> KVCache:
        """An unfilled cache of the case's layout: its own tensors, or views of wider ones."""
        k: dict[int, Tensor] = {}
        v: dict[int, Tensor | None] = {}
        for layer_id, kind in enumerate(self.case.kinds, self.case.first_layer):
            if not kind.ragged:
                k[layer_id], v[layer_id] = self._pools(kind)
        return KVCache(k, v, page_size=self.page_size, layout=self.case.layout)

    def _pools(self, kind: LayerKind) -> tuple[Tensor, Tensor | None]:
        pages, page, heads = self.site.num_pages, self.page_size, kind.num_kv_heads
        dtype, options = cache_dtype(self.config), self.case.options
        inner = {"NHD": (page, heads), "HND": (heads, page), "MLA": (page,)}[self.case.layout]
        if kind.kind == "mla":
            padding = 64 if "joined" in options else 0
            wide = torch.zeros(pages, *inner, kind.qk_head_dim + padding, dtype=dtype, device=self.device)
            return wide[..., : kind.qk_head_dim], None
        if "joined" in options:
            wide = torch.zeros(pages, *inner, kind.qk_head_dim + kind.v_head_dim, dtype=dtype, device=self.device)
            return wide[..., : kind.qk_head_dim], wide[..., kind.qk_head_dim :]
        if "stacked" in options:
            width = max(kind.qk_head_dim, kind.v_head_dim)
            wide = torch.zeros(pages, 2, *inner, width, dtype=dtype, device=self.device)
            return wide[:, 0, ..., : kind.qk_head_dim], wide[:, 1, ..., : kind.v_head_dim]
        own = [
            torch.zeros(pages, *inner, width, dtype=dtype, device=self.device)
            for width in (kind.qk_head_dim, kind.v_head_dim)
        ]
        return own[0], own[1]

    def fill(self, cache: KVCache, *, poison: bool) -> None:
        """Put the truth where tokens are cached already, and junk (or NaN and infinities) everywhere else."""
        for layer in self.layers:
            if layer.layer_id in self.truth:
                truth = self.truth[layer.layer_id]
                self._fill_pool(cache.k_nhd(layer.layer_id), "k", truth.k, truth.junk_k, layer, poison)
                if cache.v(layer.layer_id) is not None and truth.v is not None and truth.junk_v is not None:
                    self._fill_pool(cache.v_nhd(layer.layer_id), "v", truth.v, truth.junk_v, layer, poison)

    def _fill_pool(
        self, pool: Tensor, name: str, truth: Tensor, junk: Tensor, layer: AttentionLayer, poison: bool
    ) -> None:
        """pool [pages, page_size, H, D]: made once on the host, then copied each time."""
        bits = torch.uint8 if pool.dtype in FP8_DTYPES else pool.dtype
        key = layer.layer_id, name, poison
        if key not in self._contents:
            scale = layer.k_scale if name == "k" else layer.v_scale
            content = _content(truth, junk, self._known(layer), scale, pool.dtype, poison)
            self._contents[key] = content.view(bits).view(-1, *pool.shape[1:])
        self.site.put(pool.view(bits), self._contents[key])

    def _known(self, layer: AttentionLayer) -> Tensor:
        """The slots whose tokens are in the cache before the first step: prefixes, and the holes of every step."""
        found: list[int] = []
        for s, request in enumerate(self.sequences):
            if not layer.cross:
                found += self.slots(s, range(request.prefix))
                for wave in range(self._num_waves() if "holes" in self.case.options else 0):
                    start = request.prefix + wave * request.new
                    found += self.slots(s, range(start, start + request.new))[2::3]
            elif not self._writes_encoder(0):
                found += slots_of(self.encoder_pages[s], range(request.encoder), self.page_size)
        return torch.tensor(found, dtype=torch.int64)

    def _writes_encoder(self, wave: int) -> bool:
        """The encoder's keys come with the prompt; later steps find them in the cache."""
        return wave == 0 and self.case.mode in ("extend", "mixed")

    # -- steps

    def _waves(self) -> list[list[Step]]:
        """Batches that are in flight together, one list after the other."""
        if self.case.mode == "ragged":
            return []
        if "graph" in self.case.options:
            return self._replayed()
        waves = []
        for wave in range(self._num_waves()):
            now = [replace(r, prefix=r.prefix + wave * r.new) for r in self.sequences]
            order = list(range(len(now)))
            if self.case.mode != "mixed":  # its decodes stay in front
                order = order[wave % len(order) :] + order[: wave % len(order)]
            size = len(self.case.requests)
            groups = [order[i : i + size] for i in range(0, len(order), size)]
            waves.append([self._step(wave, group, now) for group in groups])
        return waves

    def _replayed(self) -> list[list[Step]]:
        """What one graph is replayed for: all requests; the same grown and turned; fewer others, on other pages."""
        size = len(self.case.requests)
        grown = [replace(r, prefix=r.prefix + r.new) for r in self.sequences]
        turned = [*range(1, size), 0]
        fewer = list(range(size, size + max(1, size // 2)))
        steps = [(0, list(range(size)), self.sequences), (1, turned, grown), (1, fewer, self.sequences)]
        return [[self._step(wave, group, now)] for wave, group, now in steps]

    def _step(self, wave: int, group: list[int], now: list[Request]) -> Step:
        requests = [now[s] for s in group]
        crosses = any(layer.cross for layer in self.layers)
        batch = ForwardBatch.build(
            _FORWARD_MODES[self.case.mode],
            query_lens=[r.new for r in requests],
            seq_lens=[r.seq_len for r in requests],
            pages=[self.placement.pages[s] for s in group],
            page_size=self.page_size,
            device=self.device,
            tree=self._tree(len(group)),
            spans=[_spans(r) for r in requests] if "spans" in self.case.options else None,
            encoder_seq_lens=[r.encoder for r in requests] if crosses else None,
            encoder_pages=[self.encoder_pages[s] for s in group] if crosses else None,
            write_encoder=crosses and self._writes_encoder(wave),
        )
        own = batch.slot_mapping.clone()
        if "holes" in self.case.options:
            self._make_holes(batch)
        self._loosen(batch)
        step = Step(batch, [], tuple(group))
        for layer in self.layers:
            self._add_inputs(step, layer, batch.encoder_slot_mapping if layer.cross else own)
        self.site.move(batch)
        return step

    def _make_holes(self, batch: ForwardBatch) -> None:
        for first, last in pairwise(batch.query_start_loc.tolist()):
            batch.slot_mapping[first:last][2::3] = -1

    def _loosen(self, batch: ForwardBatch) -> None:
        """Stale page ids past the end of every row; what ``loose`` and ``nohost`` say of bounds and host copies."""
        columns = 3 if "loose" in self.case.options else 0
        batch.page_table = self._with_stale(batch.page_table, batch.seq_lens, columns)
        if batch.encoder_page_table is not None and batch.encoder_seq_lens is not None:
            batch.encoder_page_table = self._with_stale(batch.encoder_page_table, batch.encoder_seq_lens, columns)
        if "loose" in self.case.options:
            batch.max_seq_len = batch.page_table.shape[1] * self.page_size
            if batch.mode not in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY):
                batch.max_query_len += 3
            if batch.encoder_page_table is not None:
                batch.max_encoder_seq_len = batch.encoder_page_table.shape[1] * self.page_size
        if "nohost" in self.case.options:
            batch.seq_lens_cpu = batch.query_start_loc_cpu = batch.encoder_seq_lens_cpu = None

    def _with_stale(self, table: Tensor, lengths: Tensor, columns: int) -> Tensor:
        wider = torch.cat([table, table.new_zeros(table.shape[0], columns)], dim=1)
        used = (lengths + self.page_size - 1) // self.page_size
        past_end = torch.arange(wider.shape[1], device=table.device) >= used[:, None]
        return torch.where(past_end, self.placement.spare, wider).to(torch.int32)

    def _add_inputs(self, step: Step, layer: AttentionLayer, slots: Tensor | None) -> None:
        """Queries, and the truth of the new slots as keys and values; what the case hides is hidden."""
        options = self.case.options
        q = self._queries(step.batch.num_tokens, layer)
        if slots is None:  # the encoder's keys are there
            step.inputs.append(Inputs(layer, *_fused([q], options)))
            return
        truth, slots = self.truth[layer.layer_id], slots.cpu()
        k: Tensor | None = truth.k[slots]
        v = None if truth.v is None else truth.v[slots]
        if "holes" in options:
            hidden = step.batch.slot_mapping.cpu() < 0
            k = torch.where(hidden[:, None, None], truth.junk_k[slots], truth.k[slots])
            if v is not None and truth.junk_v is not None:
                v = torch.where(hidden[:, None, None], truth.junk_v[slots], v)
            step.written[layer.layer_id] = slots[~hidden]
        else:
            step.written[layer.layer_id] = slots
        if options & {"nosave", "decoy"}:
            step.write_first[layer.layer_id] = slots
        if "nosave" in options:
            k = v = None
        elif "decoy" in options:
            k, v = truth.junk_k[slots], None if truth.junk_v is None else truth.junk_v[slots]
        given = [q, *(None if t is None else t.to(self.device) for t in (k, v))]
        step.inputs.append(Inputs(layer, *_fused(given, options)))

    def ragged_inputs(self, layer: AttentionLayer, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [queries, Hq, Dqk], k [keys, Hkv, Dqk], v [keys, Hkv, Dv]."""
        q = self._queries(queries, layer)
        k = self._rows(keys, layer.num_kv_heads, layer.qk_head_dim).to(self.device)
        v = self._rows(keys, layer.num_kv_heads, layer.v_head_dim).to(self.device)
        fused = _fused([q, k, v], self.case.options)
        return fused[0], fused[1], fused[2]

    def _tree(self, batch_size: int) -> TreeMask | None:
        if not self.case.tree:
            return None
        q, topk = self.case.draft_tokens, self.case.topk
        parents = torch.full((batch_size, q), -1, dtype=torch.int64)
        dead = 1 if self.case.tree.endswith("dead") else 0
        for b in range(batch_size):
            children = [0] * q
            for i in range(1, q - dead):
                free = [j for j in range(i) if children[j] < topk]
                parent = free[int(torch.randint(len(free), (1,), generator=self._rng))]
                children[parent] += 1
                parents[b, i] = parent
        return TreeMask.from_parents(parents.to(self.device))


def _spans(request: Request) -> list[tuple[int, int]]:
    """Two spans: one that begins in the prefix (or at the start) and ends in the new tokens, one at their end."""
    start = max(0, request.prefix - 2)
    middle = request.prefix + max(1, request.new // 2)
    spans = [(start, middle), (middle + 1, request.seq_len)]
    return [(a, b) for a, b in spans if b - a > 1]


def _fused(tensors: list[Tensor | None], options: frozenset[str]) -> list[Any]:
    """q, k and v; with the option ``fused`` as views of one wide tensor, where they have the same number of rows."""
    given = [t for t in tensors if t is not None]
    padded: list[Any] = [*tensors, None, None]
    if "fused" not in options:
        return padded[:3]
    views = iter(_views(given) if len({t.shape[0] for t in given}) == 1 else [v for t in given for v in _views([t])])
    return [None if t is None else next(views) for t in padded[:3]]


def _views(tensors: list[Tensor]) -> list[Tensor]:
    wide = torch.cat([*(t.flatten(1) for t in tensors), tensors[0].new_zeros(tensors[0].shape[0], 16)], dim=1)
    widths = [t[0].numel() if t.shape[0] else t.shape[1] * t.shape[2] for t in tensors]
    parts = torch.split(wide, [*widths, 16], dim=1)
    return [part.view(-1, *t.shape[1:]) for part, t in zip(parts, tensors, strict=False)]


def _content(truth: Tensor, junk: Tensor, known: Tensor, scale: float, dtype: torch.dtype, poison: bool) -> Tensor:
    """[slots, H, D] as a cache of ``dtype`` stores it: the truth where ``known``, else ``junk`` or no numbers."""
    rows = to_stored(truth, scale, dtype)
    other = _poison(rows) if poison else to_stored(junk, scale, dtype)
    bits = torch.uint8 if dtype in FP8_DTYPES else dtype
    content = other.view(bits).clone()
    content[known] = rows.view(bits)[known]
    return content.view(dtype)


def _poison(rows: Tensor) -> Tensor:
    """NaN in every slot of even number, +inf and -inf in turn in the others; e4m3 has no infinity, so NaN."""
    special = torch.full(rows.shape, float("nan"), device=rows.device)
    if rows.dtype is not torch.float8_e4m3fn:
        special[1::4], special[3::4] = float("inf"), float("-inf")
    return special.to(rows.dtype)


def to_stored(rows: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a cache of ``dtype`` holds of these rows: rows / scale, saturated for fp8."""
    if dtype not in FP8_DTYPES:
        return rows.to(dtype)
    limit = torch.finfo(dtype).max
    return (rows.double() / scale).clamp(-limit, limit).float().to(dtype)
