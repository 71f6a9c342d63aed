"""What one case of the kit is: Case, Request, and the id that reproduces it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import Final, Literal, get_args

from attn_core.errors import UsageError, nearest
from attn_core.planning.config import AttentionConfig, LayerKind, Phase

Mode = Literal["extend", "decode", "mixed", "verify", "draft_extend", "ragged"]
#: How the pages of a case lie in the pool; ``shared`` gives requests a common first page where both have it full.
Memory = Literal["contiguous", "shuffled", "interleaved", "descending", "shared"]

MODES: Final = get_args(Mode)
MEMORIES: Final = get_args(Memory)

#: The phases that must run a mode.
PHASES_OF: Final[dict[str, tuple[Phase, ...]]] = {
    "extend": ("prefill",),
    "mixed": ("prefill", "decode"),
    "ragged": ("prefill",),
    "decode": ("decode",),
    "verify": ("verify",),
    "draft_extend": ("draft",),
}

#: What a case may do beyond the plain step: option -> meaning.
OPTIONS: Final[dict[str, str]] = {
    "lse": "the LSE is asked for, and compared",
    "out": "the output goes into a tensor of the caller's",
    "spans": "two spans see themselves both ways, one of them across the end of the prefix",
    "hot": "scores are large, so that few keys count; an fp8 cache saturates",
    "fused": "q, k and v are views of one wide tensor, as after a fused projection",
    "stacked": "the cache wraps one [pages, 2, ...] tensor",
    "joined": "the cache wraps one tensor whose rows are K and V side by side (MLA: rows with padding)",
    "nosave": "keys and values are written by write_kv before, and are not given to the forward",
    "decoy": "the same, and the forward is given other keys and values, which it must not use",
    "holes": "every third token has slot -1: its key is in the cache already, and is another than the one given",
    "nohost": "the batch has no host copies of its lengths",
    "loose": "the bounds of the batch are larger than its true lengths, and its page table is wider",
    "steps": "two more steps follow on the same backend, with other lengths and pages",
    "flight": "a second batch is prepared before the first has run, and their layers alternate",
    "twice": "the step runs three times: the same bits (feature deterministic)",
    "alone": "each request runs alone as well: the same bits (feature batch_invariant)",
    "graph": "captured once, replayed for other batches (feature cuda_graph)",
    "sinks16": "the sinks are bfloat16, as some models keep them, and not float32",
}


@dataclass(frozen=True, slots=True)
class Request:
    """``new`` tokens after a cached prefix of ``prefix``, and ``encoder`` keys for cross layers.

    Ragged: ``new`` queries over new + prefix keys; a prefix below 0 gives fewer keys than queries, or none.
    """

    new: int
    prefix: int = 0
    encoder: int = 0

    @property
    def seq_len(self) -> int:
        return self.new + self.prefix

    def __str__(self) -> str:
        return f"{self.new}@{self.prefix}" + (f"e{self.encoder}" if self.encoder else "")

    @classmethod
    def parse(cls, text: str) -> Request:
        match = re.fullmatch(r"(\d+)@(-?\d+)(?:e(\d+))?", text)
        if match is None:
            raise UsageError(
                f"request {text!r} in a case id", given=text, accepted="NEW@PREFIX, such as 1@16 or 4@16e7"
            )
        return cls(int(match[1]), int(match[2]), int(match[3] or 0))


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to try, complete: its ``id`` holds all of it.

    ``pattern`` is repeated up to ``batch`` requests. ``tree`` is "" for a chain; ``topK`` for a tree with K children a
    node, ``topKdead`` for one whose last branch is dead. ``refused`` is the reason code that must refuse the case.
    ``first_layer``: the id of the first layer, as of a later stage of a pipeline. ``far`` N: the pages lie beyond
    element 2**N of the pool, where an address of so many bits wraps around; 0 for a pool that is just large enough.
    """

    mode: Mode
    kinds: tuple[LayerKind, ...]
    pattern: tuple[Request, ...]
    batch: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    page_size: int = 16
    layout: str = "NHD"
    memory: Memory = "contiguous"
    tree: str = ""
    options: frozenset[str] = frozenset()
    refused: str = ""
    seed: int = 0
    first_layer: int = 0
    far: int = 0

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests of the step, in order."""
        return tuple(islice(cycle(self.pattern), self.batch))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that the backend under test must run."""
        return PHASES_OF[self.mode]

    @property
    def topk(self) -> int:
        """Children of each node of the tree; 1 for a chain."""
        match = re.match(r"top(\d+)", self.tree)
        return int(match[1]) if match else 1

    @property
    def draft_tokens(self) -> int:
        """Tokens of each request in a verify or draft step, 0 in others."""
        return max(r.new for r in self.pattern) if self.mode in ("verify", "draft_extend") else 0

    @property
    def id(self) -> str:
        """The text that ``Case.parse`` makes the same case of."""
        parts = [self.mode, *map(format_kind, self.kinds), ",".join(map(str, self.pattern))]
        parts += [f"{name}={getattr(self, name)}" for name in _PLAIN if getattr(self, name) != _DEFAULTS[name]]
        return "/".join([*parts, *(name for name in OPTIONS if name in self.options)])

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case with this id. Raises UsageError for text that is no case id."""
        mode, *rest = text.strip().split("/")
        if mode not in MODES:
            raise UsageError(
                f"case id {text!r}: mode {mode!r}",
                given=text,
                accepted=MODES,
                hint="copy an id that attn verify printed",
            )
        kinds = tuple(parse_kind(part) for part in rest if _KIND.match(part))
        patterns = [part for part in rest if "@" in part]
        if not kinds or len(patterns) != 1:
            raise UsageError(f"case id {text!r}: layer kinds and requests", given=text, accepted="MODE/8x2x64/4@16,...")
        pattern = tuple(Request.parse(part) for part in patterns[0].split(","))
        case = cls(mode=mode, kinds=kinds, pattern=pattern)  # type: ignore[arg-type]
        case = _with_settings(case, [part for part in rest if not _KIND.match(part) and "@" not in part])
        case.config()  # what no model can ask for is refused as any config is
        return case

    def config(self) -> AttentionConfig:
        """What planning is asked for this case. Layer i of the case is of kind i; equal kinds are one kind."""
        layers: dict[LayerKind, tuple[int, ...]] = {}
        for i, kind in enumerate(self.kinds, self.first_layer):
            layers[kind] = (*layers.get(kind, ()), i)
        return AttentionConfig(
            layers=tuple(replace(kind, layer_ids=ids) for kind, ids in layers.items()),
            dtype=self.dtype,
            kv_cache_dtype=self.kv_dtype,
            page_size=self.page_size,
            kv_layout=self.layout,
            max_context_len=self._longest_table(),
            bidirectional_spans="spans" in self.options,
            multimodal="spans" in self.options,
            lse="lse" in self.options,
            cuda_graph="graph" in self.options,
            deterministic="twice" in self.options,
            batch_invariant="alone" in self.options,
            speculative_num_draft_tokens=self.draft_tokens,
            speculative_eagle_topk=self.topk,
        )

    def kind_of(self, layer_id: int) -> LayerKind:
        """The kind of a layer of the case."""
        return self.kinds[layer_id - self.first_layer]

    def _longest_table(self) -> int:
        """Tokens that the widest page table of the case can hold: its longest sequence, later steps, spare columns."""
        tokens = max(r.seq_len + 2 * r.new for r in self.pattern)
        return (-(-tokens // self.page_size) + 4) * self.page_size

    @property
    def features(self) -> frozenset[str]:
        """The features of the closed set that a backend needs for this case."""
        config = self.config()
        return frozenset(
            name for phase in self.phases for kind in config.kinds(phase) for name in config.features(kind, phase)
        )

    def claims(self) -> frozenset[str]:
        """What about this case can be wrong by itself: features, and what is special of its shapes and memory."""
        found = {"attention", *self.features, f"dtype={self.dtype}", *self.options}
        found |= {f"page_size={self.page_size}", f"memory={self.memory}"}
        found |= {f"window={_window_claim(kind, self.page_size)}" for kind in self.kinds if kind.sliding_window}
        found |= {claim for kind in self.kinds for claim in _kind_claims(kind)}
        found |= {f"kv_layout={self.layout}"} if self.layout != "MLA" else set()
        found |= {f"kv_dtype={self.kv_dtype}"} if self.kv_dtype != "auto" else set()
        found |= {name for name, holds in self._shape_claims().items() if holds}
        return frozenset(found - {"lse", "twice", "alone", "graph", "spans"} | (self.features & {"lse"}))

    def _shape_claims(self) -> dict[str, bool]:
        page = self.page_size
        return {
            "page_size_gt_1": page > 1,
            "partial_page": any(r.seq_len % page for r in self.pattern),
            "paged": self.memory != "contiguous",
            "prefix": self.mode in ("extend", "mixed", "verify", "draft_extend")
            and any(r.prefix for r in self.pattern),
            "mixed": self.mode == "mixed",
            "several_requests": self.batch > 1,
            "several_layers": len(self.kinds) > 1,
            "several_kinds": len(set(self.kinds)) > 1,
            "empty_request": any(not r.new for r in self.pattern),
            "saturation": "hot" in self.options and self.kv_dtype != "auto",
            "not_causal": any(kind.ragged and not kind.causal for kind in self.kinds),
            "long": max(r.seq_len for r in self.pattern) > 4 * page + 16,
            "first_layer": self.first_layer > 0,
            "far": self.far > 0,
        }


def _kind_claims(kind: LayerKind) -> set[str]:
    group = kind.group_size
    claims = {f"head_dim={kind.qk_head_dim}/{kind.v_head_dim}", f"group_size={group}"}
    claims |= {"mla"} if kind.kind == "mla" else set() if kind.scale is None else {"scale"}
    return claims | ({"group_size_not_power_of_two"} if group & (group - 1) else set())


def _window_claim(kind: LayerKind, page: int) -> str:
    """What of a window may matter: itself alone, less than a page, more, or more than there is."""
    window = kind.sliding_window or 0
    return "1" if window == 1 else "short" if window < page else "long" if window < 1 << 16 else "endless"


_PLAIN: Final = (
    "batch",
    "dtype",
    "kv_dtype",
    "page_size",
    "layout",
    "memory",
    "tree",
    "refused",
    "seed",
    "first_layer",
    "far",
)
_DEFAULTS: Final = {f.name: f.default for f in fields(Case)}
#: What the values of settings look like, where that is more than a word or a number.
_VALUES: Final = {
    "memory": "|".join(MEMORIES),
    "tree": r"top\d+(dead)?",
    "batch": r"[1-9]\d*",
    "page_size": r"[1-9]\d*",
}
_KIND: Final = re.compile(r"(mla:)?(\d+)x(\d+)x(\d+)(?:-(\d+))?(?=\+|$)")


def format_kind(kind: LayerKind) -> str:
    """``8x2x64`` (query heads, KV heads, width), ``mla:16x1x576-512``, then ``+window=16+softcap=1.5+sinks...``."""
    head = f"{'mla:' if kind.kind == 'mla' else ''}{kind.num_q_heads}x{kind.num_kv_heads}x{kind.qk_head_dim}"
    head += f"-{kind.v_head_dim}" if kind.v_head_dim != kind.qk_head_dim else ""
    extras = {
        "window": kind.sliding_window,
        "softcap": kind.softcap or None,
        "scale": kind.scale,
        "sinks": kind.sinks,
        "cross": kind.cross,
        "ragged": kind.ragged,
        "full": not kind.causal,
    }
    flags = [
        name if value is True else f"{name}={value!r}" for name, value in extras.items() if value not in (None, False)
    ]
    return "+".join([head, *flags])


def parse_kind(text: str) -> LayerKind:
    """The layer kind that ``format_kind`` wrote. Raises UsageError for anything else."""
    match = _KIND.match(text)
    if match is None:
        raise UsageError(f"layer kind {text!r} in a case id", given=text, accepted="8x2x64, mla:16x1x576-512+window=16")
    mla, heads, kv_heads, width, v_width = match.groups()
    kind = LayerKind(
        int(heads), int(kv_heads), int(width), int(v_width or width), kind="mla" if mla else "mha"
    )  # fmt: skip
    for extra in text[match.end() :].split("+")[1:]:
        name, _, value = extra.partition("=")
        if name not in _EXTRAS:
            raise UsageError(f"{extra!r} in a case id", given=extra, accepted=tuple(_EXTRAS))
        try:
            kind = _EXTRAS[name](kind, value)
        except ValueError:
            raise UsageError(f"{extra!r} in a case id", given=extra, accepted=f"{name}=NUMBER") from None
    return kind


_EXTRAS: Final = {
    "window": lambda kind, value: replace(kind, sliding_window=int(value)),
    "softcap": lambda kind, value: replace(kind, softcap=float(value)),
    "scale": lambda kind, value: replace(kind, scale=float(value)),
    "sinks": lambda kind, value: replace(kind, sinks=True),
    "cross": lambda kind, value: replace(kind, cross=True),
    "ragged": lambda kind, value: replace(kind, ragged=True),
    "full": lambda kind, value: replace(kind, causal=False),
}


def _with_settings(case: Case, parts: Iterable[str]) -> Case:
    options = set()
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals and name in OPTIONS:
            options.add(name)
        elif equals and name in _PLAIN:
            if not re.fullmatch(_VALUES.get(name, r"\d+" if isinstance(_DEFAULTS[name], int) else r"\w+"), value):
                raise UsageError(f"{part!r} in a case id", given=part, hint="copy an id that attn verify printed")
            case = replace(case, **{name: int(value) if isinstance(_DEFAULTS[name], int) else value})  # type: ignore[arg-type]
        else:
            near = nearest(name, [*OPTIONS, *_PLAIN])
            raise UsageError(
                f"{part!r} in a case id",
                given=part,
                accepted=(*OPTIONS, *_PLAIN),
                hint=f"did you mean {near!r}?" if near else "copy an id that attn verify printed",
            )
    return replace(case, options=frozenset(options))
