"""Why a backend can or cannot: Reason, Decision, and `evaluate`, which is pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from attn_core.planning.claims import PageSet
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.manifest import PROTOCOL_VERSION, Clause, Manifest
from attn_core.planning.system import System

Layer = Literal["installed", "protocol", "device", "static", "dynamic"]
LAYERS: Final[tuple[Layer, ...]] = ("installed", "protocol", "device", "static", "dynamic")

#: The closed set of reason codes, each with the layer that it belongs to and what it says.
CODES: Final[Mapping[str, tuple[Layer, str]]] = MappingProxyType(
    {
        "not_installed": ("installed", "no installed distribution has this backend"),
        "disabled": ("installed", "ATTN_PLUGINS or ATTN_DISABLE leaves its distribution out"),
        "broken_plugin": ("installed", "its entry point or manifest cannot be used"),
        "ambiguous": ("installed", "two distributions claim the name"),
        "missing_dist": ("installed", "a distribution that it requires is not installed"),
        "dist_version": ("installed", "a distribution that it requires is installed in another version"),
        "protocol_mismatch": ("protocol", "it was built for another version of the contract"),
        "device_mismatch": ("device", "no clause is for this device"),
        "arch_mismatch": ("device", "no clause is for this chip"),
        "kind_unsupported": ("static", "the kind of attention (mha or mla; cached or ragged)"),
        "phase_unsupported": ("static", "the phase"),
        "dtype_unsupported": ("static", "the dtype of queries and output"),
        "kv_dtype_unsupported": ("static", "the dtype of the cache"),
        "head_dim_unsupported": ("static", "the widths of a head, keys / values"),
        "group_size_unsupported": ("static", "the number of query heads for each KV head"),
        "kv_layout_unsupported": ("static", "the layout of the cache"),
        "page_size_unsupported": ("static", "the page size, natively or by conversion"),
        "feature_unsupported": ("static", "a feature of the closed set"),
        "draft_tokens_unsupported": ("static", "the number of draft tokens of a verify step"),
        "no_common_cache": ("static", "what shares a cache has no common page size and layout"),
        "build_unsupported": ("dynamic", "the installed kernel library was built without it"),
    }
)

#: Layouts whose pages can be read as smaller ones: in HND a page holds all its tokens of one head, so it cannot.
SPLITTABLE_LAYOUTS: Final = ("NHD", "MLA")
#: The order in which a layout is preferred where nobody asks for one.
LAYOUT_ORDER: Final = ("NHD", "HND", "MLA")
#: The order in which page sizes are preferred where nobody asks for one: 16 wastes little and makes short tables.
PAGE_ORDER: Final = (16, 64, 32, 128, 1, 8, 4, 2, 256, 48)


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that stands against a backend: what was wanted, what it has, and what would help.

    ``kind`` is the index in ``config.layers`` of the layer kind it is about, None if it is about all that run.
    """

    code: str
    field: str
    wanted: str
    have: str
    hint: str | None = None
    layer: Layer = "static"
    kind: int | None = None

    def __str__(self) -> str:
        return self.text(() if self.kind is None else (self.kind,))

    def text(self, kinds: Sequence[int]) -> str:
        """One line for people, about these layer kinds (none: all that run)."""
        about = f" (layer kind{'s' * (len(kinds) > 1)} {', '.join(map(str, kinds))})" if kinds else ""
        hint = f"; {self.hint}" if self.hint else ""
        if self.layer == "installed":  # what is wanted and had are here the plugin's needs, and what the machine has
            return f"{self.code}: {self.wanted}{f' ({self.have})' if self.have else ''}{hint}"
        return f"{self.code}: {self.field} {self.wanted}{about}, accepted: {self.have}{hint}"

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON data."""
        return {
            "code": self.code,
            "field": self.field,
            "wanted": self.wanted,
            "have": self.have,
            "hint": self.hint,
            "layer": self.layer,
            "kind": self.kind,
        }


def reason(
    code: str, field: str, wanted: object, have: object, hint: str | None = None, kind: int | None = None
) -> Reason:
    """A Reason of the closed set, in the layer of its code. Raises KeyError for a code that is not in CODES."""
    return Reason(code, field, str(wanted), str(have), hint, CODES[code][0], kind)


@dataclass(frozen=True, slots=True)
class Decision:
    """What `evaluate` found for one backend and one phase.

    reasons: why not, root cause first; empty if accepted. notes: what could not be judged, the system being elsewhere.
    caches: for each layout that all layer kinds of the phase can share, the page sizes they all have natively, in
    tokens. page_size: the one asked for, None if free. native_page_size: the one the backend is given; smaller than
    ``page_size`` where the page table is converted, None while the page size is free.
    clauses: for each of ``config.layers`` the index of the clause that takes it, None where it does not run.
    """

    backend: str
    phase: Phase
    accepted: bool
    reasons: tuple[Reason, ...] = ()
    notes: tuple[Reason, ...] = ()
    caches: tuple[tuple[str, PageSet], ...] = ()
    page_size: int | None = None
    native_page_size: int | None = None
    clauses: tuple[int | None, ...] = ()

    @property
    def layouts(self) -> tuple[str, ...]:
        """The KV layouts that all layer kinds of the phase can share."""
        return tuple(layout for layout, _ in self.caches)

    @property
    def pages(self) -> PageSet:
        """The native page sizes, in whichever of the layouts."""
        union = PageSet.of()
        for _, pages in self.caches:
            union |= pages
        return union

    @property
    def converted(self) -> bool:
        """Whether the page table is rewritten to smaller pages in every step."""
        return self.native_page_size != self.page_size

    def allows(self, page_size: int, layout: str) -> bool:
        """Whether a cache of this page size and layout can be used, natively or by conversion."""
        return self.native_for(page_size, layout) is not None

    def native_for(self, page_size: int, layout: str) -> int | None:
        """The native page size that would serve a cache of ``page_size``, None if none can."""
        return next((native_page(pages, page_size, name) for name, pages in self.caches if name == layout), None)

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON data."""
        return {
            "backend": self.backend,
            "phase": self.phase,
            "accepted": self.accepted,
            "reasons": [r.to_json() for r in self.reasons],
            "notes": [r.to_json() for r in self.notes],
            "caches": {layout: str(pages) for layout, pages in self.caches},
            "page_size": self.page_size,
            "native_page_size": self.native_page_size,
            "clauses": list(self.clauses),
        }


def native_page(pages: PageSet, page_size: int, layout: str) -> int | None:
    """``page_size`` if it is native, else the largest native divisor of it if the layout can be split, else None.

    The largest divisor needs the shortest rewritten page table.
    """
    if pages.allows(page_size):
        return page_size
    return pages.largest_divisor(page_size) if layout in SPLITTABLE_LAYOUTS else None


def evaluate(manifest: Manifest, config: AttentionConfig, phase: Phase, system: System) -> Decision:
    """Whether a backend with this manifest can run ``phase`` of ``config`` on ``system``: pure.

    A layer kind is accepted if one clause accepts all of it; all kinds that run in the phase must be accepted, with a
    page size and a layout in common. A refusal lists all that fails in the nearest clause, the one whose first failure
    comes latest in the order device, arch, kind, phase, dtype, KV dtype, head, layout, page, features.
    What the installation and the protocol lack is listed before it.
    """
    for_device = any(_is_for(clause, system) for clause in manifest.clauses)
    missing = tuple(_missing(manifest, system, for_device))
    before = () if system.forced else missing
    notes = missing if system.forced else ()
    if not manifest.speaks_protocol:
        before += (_protocol_reason(manifest),)
    if not for_device:
        return Decision(manifest.name, phase, False, (*before, _device_reason(manifest, system)), notes)
    static = _judge(manifest, config, phase, system)
    reasons = before + static.reasons
    return Decision(
        manifest.name, phase, not reasons, reasons, notes, static.caches, config.page_size,
        static.native if not reasons else None, static.clauses,
    )  # fmt: skip


def availability(manifest: Manifest, system: System) -> tuple[Reason, ...]:
    """What stands against any use of a backend on ``system``, whatever is asked of it; root cause first.

    What a system that is not here (``forced``) has installed cannot be judged, and is left out.
    """
    for_device = any(_is_for(clause, system) for clause in manifest.clauses)
    reasons = () if system.forced else tuple(_missing(manifest, system, for_device))
    if not manifest.speaks_protocol:
        reasons += (_protocol_reason(manifest),)
    if not for_device:
        return (*reasons, _device_reason(manifest, system))
    if not any(_is_for(clause, system) and clause.arch.allows(system.arch) for clause in manifest.clauses):
        archs = dict.fromkeys(str(clause.arch) for clause in manifest.clauses if _is_for(clause, system))
        reasons += (reason("arch_mismatch", "arch", system.arch or "unknown", " or ".join(archs)),)
    return reasons


def _is_for(clause: Clause, system: System) -> bool:
    return system.device in clause.devices or "any" in clause.devices


def _missing(manifest: Manifest, system: System, for_device: bool) -> Iterator[Reason]:
    for requirement in manifest.requires_dists:
        if requirement.satisfied(system.dists):
            continue
        found = requirement.found(system.dists)
        hint = f"pip install '{requirement.text.split(' | ')[0]}'" if for_device else None
        have = ", ".join(f"{name} {version}" for name, version in found.items()) or "not installed"
        yield reason("dist_version" if found else "missing_dist", "requires.dists", requirement, have, hint)


def _protocol_reason(manifest: Manifest) -> Reason:
    hint = "upgrade the older one of attn-core and the plugin"
    return reason("protocol_mismatch", "protocol", PROTOCOL_VERSION, manifest.protocol, hint)


def _device_reason(manifest: Manifest, system: System) -> Reason:
    devices = dict.fromkeys(device for clause in manifest.clauses for device in clause.devices)
    return reason("device_mismatch", "device", system.device, ", ".join(devices))


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the clauses say of all layer kinds together."""

    reasons: tuple[Reason, ...]
    caches: tuple[tuple[str, PageSet], ...] = ()
    native: int | None = None
    clauses: tuple[int | None, ...] = ()


def _judge(manifest: Manifest, config: AttentionConfig, phase: Phase, system: System) -> _Verdict:
    running = [i for i, kind in enumerate(config.layers) if kind in config.kinds(phase)]
    accepting: dict[int, list[int]] = {}
    refused: list[tuple[int, list[_Failure]]] = []
    for i in running:
        failures = [list(_failures(clause, config, config.layers[i], phase, system)) for clause in manifest.clauses]
        accepting[i] = [c for c, failed in enumerate(failures) if not failed]
        if not accepting[i]:
            refused.append((i, _nearest(failures)))
    if refused:
        return _Verdict(_gathered(refused, len(running)))
    cached = [i for i in running if not config.layers[i].ragged]
    caches = _shared_caches(manifest, config, [accepting[i] for i in cached])
    if not caches:
        return _Verdict((_nothing_shared(manifest, config, {i: accepting[i] for i in cached}),))
    layout, pages = caches[0]
    native = None if config.page_size is None else native_page(pages, config.page_size, layout)
    return _Verdict((), caches, native, tuple(
        _clause_for(manifest, kind, accepting.get(i, []), layout, native) for i, kind in enumerate(config.layers)
    ))  # fmt: skip


#: How far a clause got before the failure, and the failure.
_Failure = tuple[int, Reason]


def _failures(
    clause: Clause, config: AttentionConfig, kind: LayerKind, phase: Phase, system: System
) -> Iterator[_Failure]:
    """Everything of this clause that a layer kind does not fit, in the order of the steps."""
    if not _is_for(clause, system):
        yield 0, reason("device_mismatch", "device", system.device, ", ".join(clause.devices))
        return
    if not clause.arch.allows(system.arch):
        yield 1, reason("arch_mismatch", "arch", system.arch or "unknown", clause.arch, _arch_hint(system))
    if kind.kind != clause.kind:
        yield 2, reason("kind_unsupported", "kind", kind.kind, clause.kind)
        return  # heads, pages and features of another kind of attention say nothing about this one
    if not (kind.ragged or clause.cached):
        yield 2, reason("kind_unsupported", "kind", f"{kind.kind} with a cache", f"{clause.kind}, ragged only")
    if phase not in clause.phases:
        yield 3, reason("phase_unsupported", "phase", phase, ", ".join(clause.phases))
    if config.dtype not in clause.dtypes:
        yield 4, reason("dtype_unsupported", "dtype", config.dtype, ", ".join(clause.dtypes))
    if not kind.ragged and config.kv_cache_dtype not in clause.kv_dtypes:
        yield 5, reason("kv_dtype_unsupported", "kv_cache_dtype", config.kv_cache_dtype, ", ".join(clause.kv_dtypes))
    if not clause.head_dims.allows(kind.qk_head_dim, kind.v_head_dim):
        yield 6, reason("head_dim_unsupported", "head_dim", f"{kind.qk_head_dim}/{kind.v_head_dim}", clause.head_dims)
    if clause.max_group_size is not None and kind.group_size > clause.max_group_size:
        yield 6, reason("group_size_unsupported", "group_size", kind.group_size, f"up to {clause.max_group_size}")
    if not kind.ragged and clause.cached:
        yield from _cache_failures(clause, config)
    for feature in sorted(config.features(kind, phase) - clause.features):
        yield 9, reason("feature_unsupported", "features", feature, ", ".join(sorted(clause.features)) or "none")
    if phase == "verify" and clause.max_draft_tokens is not None:
        wanted = config.speculative_num_draft_tokens
        if wanted > clause.max_draft_tokens:
            yield 9, reason("draft_tokens_unsupported", "draft_tokens", wanted, f"up to {clause.max_draft_tokens}")


def _cache_failures(clause: Clause, config: AttentionConfig) -> Iterator[_Failure]:
    layouts = clause.kv_layouts
    if config.kv_layout is not None:
        if config.kv_layout not in layouts:
            yield 7, reason("kv_layout_unsupported", "kv_layout", config.kv_layout, ", ".join(layouts))
        else:
            layouts = (config.kv_layout,)
    size = config.page_size
    if size is not None and not any(native_page(clause.pages, size, layout) for layout in layouts):
        yield 8, reason("page_size_unsupported", "page_size", size, clause.pages, _page_hint(clause.pages, size))


def _arch_hint(system: System) -> str | None:
    return None if system.arch else f"name it with ATTN_FORCE_SYSTEM={system.device}:ARCH"


def _page_hint(pages: PageSet, size: int) -> str:
    divisor = pages.largest_divisor(size)
    if divisor is not None:
        return f"pages of {size} cannot be read as pages of {divisor} in the layout HND: use NHD or page size {divisor}"
    usual = next((n for n in PAGE_ORDER if pages.allows(n)), None)
    return f"try {usual if usual is not None else next(iter(pages))}"


def _nearest(failures: list[list[_Failure]]) -> list[_Failure]:
    """The failures of the clause that gets furthest (then fails least); its first says what like clauses accept too."""
    nearest = min(failures, key=lambda failed: (-failed[0][0], len(failed)))
    step, root = nearest[0]
    if root.code == "feature_unsupported":
        return nearest
    same = [failed[0][1] for failed in failures if failed[0][0] == step]
    accepted = dict.fromkeys([root.have, *(r.have for r in same if (r.code, r.wanted) == (root.code, root.wanted))])
    return [(step, replace(root, have=" or ".join(accepted))), *nearest[1:]]


def _gathered(refused: list[tuple[int, list[_Failure]]], running: int) -> tuple[Reason, ...]:
    """The reasons of all refused layer kinds, root cause first; one that all kinds share is said once, of none."""
    kinds: dict[_Failure, list[int]] = {}
    for i, failures in refused:
        for failure in failures:
            kinds.setdefault(failure, []).append(i)
    ordered = sorted(kinds.items(), key=lambda item: (LAYERS.index(item[0][1].layer), item[0][0]))
    return tuple(
        replace(r, kind=kind) for (_, r), found in ordered for kind in (found if len(found) < running else [None])
    )


def _shared_caches(
    manifest: Manifest, config: AttentionConfig, accepting: list[list[int]]
) -> tuple[tuple[str, PageSet], ...]:
    """For each layout that every cached layer kind can have: the native page sizes that they all have."""
    caches = []
    for layout in (config.kv_layout,) if config.kv_layout else LAYOUT_ORDER:
        pages = PageSet()
        for clauses in accepting:
            pages &= _pages_of(manifest, clauses, layout)
        if pages and (config.page_size is None or native_page(pages, config.page_size, layout)):
            caches.append((layout, pages))
    return tuple(caches)


def _pages_of(manifest: Manifest, clauses: list[int], layout: str) -> PageSet:
    union = PageSet.of()
    for c in clauses:
        if layout in manifest.clauses[c].kv_layouts:
            union |= manifest.clauses[c].pages
    return union


def _nothing_shared(manifest: Manifest, config: AttentionConfig, accepting: dict[int, list[int]]) -> Reason:
    sides = [
        f"kind {i}: " + "; ".join(f"{name} {p}" for name in LAYOUT_ORDER if (p := _pages_of(manifest, clauses, name)))
        for i, clauses in accepting.items()
    ]
    wanted = f"page size {config.page_size or 'any'}, layout {config.kv_layout or 'any'} for all layer kinds"
    return reason(
        "no_common_cache", "cache", wanted, " | ".join(sides), "put the layer kinds into KV groups of their own"
    )


def _clause_for(
    manifest: Manifest, kind: LayerKind, accepting: list[int], layout: str, native: int | None
) -> int | None:
    for c in accepting:
        clause = manifest.clauses[c]
        if kind.ragged or (layout in clause.kv_layouts and (native is None or clause.pages.allows(native))):
            return c
    return None
