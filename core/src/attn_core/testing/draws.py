"""Random cases, as a strategy of hypothesis: most within what one clause claims, some from all that has a meaning.

Everything shrinks towards one token of one request, in the first value of each list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attn_core.errors import ConfigError
from attn_core.planning.config import DTYPES, FEATURES, KV_DTYPES, LayerKind
from attn_core.planning.manifest import Clause, Manifest
from attn_core.planning.system import System
from attn_core.testing import axes
from attn_core.testing.cases import MEMORIES, MODES, Case, Mode, Request
from attn_core.testing.generation import cached_clause, grounds_of

Pair = tuple[int, int]

_WIDTHS: Final = (1, 8, 16, 24, 40, 64, 80, 96, 128)
_PAGES: Final = (1, 2, 3, 5, 8, 16, 17, 32, 48, 64)
#: A larger pool takes longer than it proves.
_LARGEST_PAGE: Final = 128
_TREES: Final = ("", "top2", "top2dead", "top3")
_WRAPPED: Final = ("", "stacked", "joined")
_WRITES: Final = ("", "nosave", "decoy", "holes")
_FLAGS: Final = ("lse", "out", "hot", "fused", "nohost", "loose")
_WINDOWS: Final = (None, 1, 2, 7, 16, 1 << 20)
_SOFTCAPS: Final = (0.0, 1.5, 20.0)
_MOST_HEADS: Final = 9
_MOST_DRAFTS: Final = 6
_FAR: Final = 1 << 80
#: What is done beyond the one step, in the modes that can, and the feature it asks for.
_AGAIN: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "": (MODES, ""),
    "twice": (MODES, "deterministic"),
    "alone": (MODES, "batch_invariant"),
    "steps": (tuple(m for m in MODES if m != "ragged"), ""),
    "flight": (tuple(m for m in MODES if m != "ragged"), ""),
    "graph": (("decode", "verify"), "cuda_graph"),
}
#: Of four random cases, how many ask for what some clause claims.
_WITHIN: Final = (True, True, True, False)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values that a random case is drawn from, for one mode and one kind of attention.

    ``beside``: the layer kind that gives a ragged case its cache.
    """

    mode: Mode
    kind: str
    widths: Sequence[Pair]
    groups: Sequence[int]
    dtypes: Sequence[str]
    kv_dtypes: Sequence[str]
    pages: Sequence[int]
    layouts: Sequence[str]
    trees: Sequence[str]
    features: frozenset[str]
    most_drafts: int
    host_optional: bool
    beside: tuple[LayerKind, ...] = ()

    def has(self, feature: str) -> bool:
        """Whether a case may ask for the feature."""
        return feature in self.features

    @property
    def again(self) -> list[str]:
        """What may be done beyond the one step."""
        return [
            name for name, (modes, needs) in _AGAIN.items() if self.mode in modes and (not needs or self.has(needs))
        ]


def cases(manifest: Manifest, system: System) -> Any:
    """The strategy for a backend on a machine."""
    from hypothesis import strategies as st

    free = _by_mode(_free(not manifest.needs_host_lengths))
    claimed = _by_mode(_claimed(manifest, system)) or free

    @st.composite
    def drawn(draw: Any) -> Case:
        by_mode = claimed if draw(one_of(_WITHIN)) else free
        bounds = draw(one_of(by_mode[draw(one_of([*by_mode]))]))
        kinds = draw(_kinds(bounds))
        crosses = any(kind.cross for kind in kinds)
        pattern = draw(_requests(bounds, crosses))
        again = draw(one_of(bounds.again))
        return Case(
            mode=bounds.mode,
            kinds=(*bounds.beside, *kinds),
            pattern=pattern,
            batch=len(pattern),
            dtype=draw(one_of(bounds.dtypes)),
            kv_dtype=draw(one_of(bounds.kv_dtypes)),
            page_size=draw(one_of(bounds.pages)),
            layout=draw(one_of(bounds.layouts)),
            memory=draw(one_of(MEMORIES)),
            tree=draw(one_of(bounds.trees)),
            options=draw(_options(bounds, crosses, again)),
            seed=draw(number(0, 3)),
        )

    return drawn().filter(lambda case: _is_possible(case) and not _splits_what_is_stacked(case, manifest, system))


def one_of(values: Sequence[Any]) -> Any:
    """Each value as likely as the others; shrinks towards the first."""
    return number(0, len(values) - 1).map(lambda i: values[i])


def number(least: int, most: int) -> Any:
    """Each number as likely as the others; shrinks towards the least.

    Hypothesis likes numbers that stand in the code that is loaded, whichever that is: then a seed would mean something
    else in another process. No code has numbers as large as those that are drawn here.
    """
    from hypothesis import strategies as st

    return st.integers(_FAR + least, _FAR + most).map(lambda drawn: drawn - _FAR)


def _by_mode(every: Iterable[Bounds]) -> dict[str, list[Bounds]]:
    found: dict[str, list[Bounds]] = {}
    for bounds in every:
        found.setdefault(bounds.mode, []).append(bounds)
    return found


def _free(host_optional: bool) -> Iterator[Bounds]:
    """Every mode and kind, with any value."""
    for mode in MODES:
        for kind in ("mha",) if mode == "ragged" else ("mha", "mla"):
            yield Bounds(
                mode=mode,
                kind=kind,
                widths=[(a + b, b) if kind == "mla" else (a, b) for a in _WIDTHS for b in _WIDTHS],
                groups=range(1, _MOST_HEADS + 1),
                dtypes=("float32", *(name for name in DTYPES if name != "float32")),
                kv_dtypes=KV_DTYPES,
                pages=_PAGES,
                layouts=("MLA",) if kind == "mla" else ("NHD", "HND"),
                trees=_TREES if mode == "verify" else ("",),
                features=frozenset(FEATURES),
                most_drafts=_MOST_DRAFTS,
                host_optional=host_optional,
                beside=(LayerKind(2, 1, 16, 16),) if mode == "ragged" else (),
            )


def _claimed(manifest: Manifest, system: System) -> Iterator[Bounds]:
    """Every mode that a clause of the machine runs, with the values that the clause has."""
    for ground in grounds_of(manifest, "stress", system):
        clause, plain, ragged = ground.clause, ground.plain(), ground.mode == "ragged"
        yield Bounds(
            mode=ground.mode,
            kind=clause.kind,
            widths=_widths(clause),
            groups=[n for n in range(1, _MOST_HEADS + 1) if n <= (clause.max_group_size or n)],
            dtypes=[plain.dtype] if ragged else axes.dtypes(clause),
            kv_dtypes=[plain.kv_dtype] if ragged else sorted(clause.kv_dtypes, key=lambda name: name != "auto"),
            pages=_pages(cached_clause(ground) or clause) or [plain.page_size],
            layouts=[plain.layout] if ragged else clause.kv_layouts,
            trees=[ground.tree],
            features=clause.features,
            most_drafts=min(_MOST_DRAFTS, clause.max_draft_tokens or _MOST_DRAFTS),
            host_optional=not manifest.needs_host_lengths,
            beside=plain.kinds[:-1],
        )


def _widths(clause: Clause) -> list[Pair]:
    """The widths (keys, values) of a clause: its edges, and what it takes of the usual ones."""
    latent = clause.kind == "mla"
    usual = [(a + b, b) if latent else (a, b) for a in _WIDTHS for b in _WIDTHS]
    return list(dict.fromkeys([*axes.head_dims(clause, "stress"), *(w for w in usual if clause.head_dims.allows(*w))]))


def _pages(clause: Clause) -> list[int]:
    """The page sizes that a clause has, or is served by splitting them."""
    usual = [n for n in _PAGES if clause.pages.allows(n) or clause.pages.largest_divisor(n)]
    edges = [n for n in axes.page_sizes(clause, "stress") if n <= _LARGEST_PAGE]
    return list(dict.fromkeys([*usual, *edges]))


def _kinds(bounds: Bounds) -> Any:
    """One to three layer kinds; of a ragged case the one that runs."""
    from hypothesis import strategies as st

    has, latent, ragged = bounds.has, bounds.kind == "mla", bounds.mode == "ragged"
    may_cross = not ragged and bounds.mode not in ("verify", "draft_extend") and has("cross")

    @st.composite
    def kind(draw: Any) -> LayerKind:
        widths, kv_heads = draw(one_of(bounds.widths)), 1 if latent else draw(number(1, 3))
        cross = may_cross and draw(st.booleans())
        causal = not ragged or draw(st.booleans())
        windows = _WINDOWS if has("sliding_window") and not cross and causal else (None,)
        return LayerKind(
            num_q_heads=kv_heads * draw(one_of(bounds.groups)),
            num_kv_heads=kv_heads,
            qk_head_dim=widths[0],
            v_head_dim=widths[1],
            kind="mla" if latent else "mha",
            scale=draw(one_of((0.125, 0.3) if latent else (None, 0.2))),
            sliding_window=draw(one_of(windows)),
            softcap=draw(one_of(_SOFTCAPS if has("softcap") else (0.0,))),
            sinks=has("sinks") and draw(st.booleans()),
            cross=cross,
            ragged=ragged,
            causal=causal,
        )

    return st.lists(kind(), min_size=1, max_size=1 if ragged else 3).map(tuple)


def _requests(bounds: Bounds, crosses: bool) -> Any:
    """One to six requests in the order of the mode: a mixed step has its decodes in front."""
    from hypothesis import strategies as st

    mode = bounds.mode
    new = {"decode": st.just(1), "verify": number(1, bounds.most_drafts)}.get(mode, number(0, 40))
    encoder = number(1, 40) if crosses else st.just(0)
    requests = st.lists(st.builds(Request, new, number(0, 90), encoder), min_size=1, max_size=6)

    def ordered(rows: list[Request]) -> tuple[Request, ...]:
        if mode == "verify":  # as many draft tokens for every request
            return tuple(Request(rows[0].new, row.prefix, row.encoder) for row in rows)
        return tuple(sorted(rows, key=lambda row: row.new != 1)) if mode == "mixed" else tuple(rows)

    return requests.map(ordered)


def _options(bounds: Bounds, crosses: bool, again: str) -> Any:
    """What a case does beyond the plain step, ``again`` among it."""
    from hypothesis import strategies as st

    ragged = bounds.mode == "ragged"
    flags = [name for name in _FLAGS if name != "lse" or bounds.has("lse")]
    flags = [name for name in flags if name != "nohost" or bounds.host_optional]
    flags = [name for name in flags if not ragged or name not in ("nohost", "loose")]
    flags += ["spans"] if bounds.mode in ("extend", "mixed") and bounds.has("bidirectional_spans") else []
    # an encoder's keys have no holes, and a graph writes what it is given
    writes = [name for name in _WRITES if not (crosses and name == "holes")]
    writes = [name for name in writes if again != "graph" or name not in ("nosave", "decoy")]
    wrapped = [name for name in _WRAPPED if bounds.kind == "mha" or name != "stacked"]

    @st.composite
    def drawn(draw: Any) -> frozenset[str]:
        options = {name for name in flags if draw(st.booleans())} | {again}
        if not ragged:
            options |= {draw(one_of(wrapped)), draw(one_of(writes))}
        return frozenset(options - {""})

    return drawn()


def _is_possible(case: Case) -> bool:
    """Whether the case asks for something that has a meaning: at least one token, and a config that can be."""
    if not any(r.new for r in case.pattern) or (case.mode == "draft_extend" and not case.draft_tokens):
        return False
    if case.tree and case.draft_tokens < 3:
        return False
    try:
        case.config()
    except ConfigError:
        return False
    return True


def _splits_what_is_stacked(case: Case, manifest: Manifest, system: System) -> bool:
    """Whether pages might have to be split that lie apart: no view can do that, and building says so."""
    here = [c for c in manifest.clauses if system.device in c.devices or "any" in c.devices]
    return "stacked" in case.options and not all(c.pages.allows(case.page_size) for c in here if c.cached)
