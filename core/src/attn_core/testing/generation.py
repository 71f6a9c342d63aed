"""The cases that a manifest calls for: a ladder of single steps away from the plainest case, and covering arrays.

The ladder changes one thing at a time, so that a fault can be named: each declared feature alone, each dtype, each
edge. The covering array puts every two values of different axes together in some case. Both are made for every clause
and every mode that its phases run; what no clause claims is in `refusals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from attn_core.planning.config import LayerKind
from attn_core.planning.manifest import Clause, Manifest
from attn_core.planning.system import System
from attn_core.testing import axes
from attn_core.testing.axes import Tier
from attn_core.testing.cases import MEMORIES, Case, Mode
from attn_core.testing.claimed import is_claimed
from attn_core.testing.covering import Row, covering_rows

#: A cap near the scores' own size, where forgetting it or misplacing it changes much.
SOFTCAP: Final = 1.5
#: Longer than any sequence of the kit: a window that must change nothing.
ENDLESS_WINDOW: Final = 1 << 20
#: Draft tokens of a verify step.
DRAFT_TOKENS: Final = 5

#: Values of these axes mean something only between the requests of a batch.
_BETWEEN_REQUESTS: Final = ("memory", "batch_invariant", "cuda_graph")
#: 33 requests in larger pages than this take more memory than they prove.
_LARGEST_PAGE_OF_MANY: Final = 64
_ALL_MODES: Final[tuple[Mode, ...]] = ("extend", "decode", "verify", "mixed", "draft_extend", "ragged")


@dataclass(frozen=True, slots=True)
class Ground:
    """One clause on one machine, in one mode: what cases are made of."""

    manifest: Manifest
    clause: Clause
    system: System
    tier: Tier
    mode: Mode
    tree: str = ""
    seed: int = 0

    @property
    def page_size(self) -> int:
        """The plain page size: of this clause, or of the cached one beside a ragged clause."""
        return axes.page_sizes(cached_clause(self) or self.clause, self.tier)[0]

    @property
    def draft_tokens(self) -> int:
        return min(DRAFT_TOKENS, self.clause.max_draft_tokens or DRAFT_TOKENS)

    def plain(self) -> Case:
        """The plainest case: one request that fills its pages, the most exact dtype, no feature but the mode's own."""
        clause = self.clause
        kind = axes.layer_kind(clause, axes.head_dims(clause, self.tier)[0], axes.group_sizes(clause)[0])
        layout = clause.kv_layouts[0] if clause.cached else "NHD"
        case = Case(
            mode=self.mode,
            kinds=(kind,),
            pattern=(),
            dtype=axes.dtypes(clause)[0],
            kv_dtype="auto" if "auto" in clause.kv_dtypes else clause.kv_dtypes[0],
            page_size=self.page_size,
            layout=layout,
            tree=self.tree,
            seed=self.seed,
        )
        case = with_pattern(case, "plain", self.draft_tokens)
        return beside_a_cache(self, case) if self.mode == "ragged" else case


def generate_cases(manifest: Manifest, tier: Tier, system: System, seed: int = 0) -> list[Case]:
    """Every case that must be right: for each clause of this machine and each mode, the ladder and the covering array.

    Each case stands once, the ladders first. A case that the clauses do not claim whole is not made.
    """
    return _made(manifest, tier, system, seed, (ladder, graphs, pairs))


def ladder_cases(manifest: Manifest, tier: Tier, system: System, seed: int = 0) -> list[Case]:
    """The ladders alone: enough to notice a fault in one thing, and to name it."""
    return _made(manifest, tier, system, seed, (ladder,))


def _made(
    manifest: Manifest, tier: Tier, system: System, seed: int, makes: tuple[Callable[[Ground], Iterator[Case]], ...]
) -> list[Case]:
    grounds = list(grounds_of(manifest, tier, system, seed))
    made = [case for make in makes for ground in grounds for case in make(ground)]
    return [case for case in dict.fromkeys(made) if is_claimed(manifest, case, system)]


def grounds_of(manifest: Manifest, tier: Tier, system: System, seed: int = 0) -> Iterator[Ground]:
    """Every clause of the machine in every mode that it runs."""
    for clause in manifest.clauses:
        here = system.device in clause.devices or "any" in clause.devices
        if here and clause.arch.allows(system.arch):
            for mode in _ALL_MODES:
                for tree in _trees(clause, mode, tier):
                    yield Ground(manifest, clause, system, tier, mode, tree, seed)


def _trees(clause: Clause, mode: Mode, tier: Tier) -> tuple[str, ...]:
    """The trees to verify ("" for a chain, and in every other mode); none if the clause does not run the mode."""
    has = clause.features.__contains__
    if mode == "verify":
        chain = ("",) if has("verify_chain") else ()
        trees = ("top2dead",) if tier == "contract" else ("top2", "top3dead")
        return (chain + (trees if has("verify_tree") else ())) if "verify" in clause.phases else ()
    runs = {
        "extend": "prefill" in clause.phases and clause.cached,
        "mixed": {"prefill", "decode"} <= {*clause.phases} and clause.cached,
        "decode": "decode" in clause.phases,
        "draft_extend": "draft" in clause.phases,
        "ragged": "prefill" in clause.phases and has("ragged"),
    }
    return ("",) if runs[mode] else ()


def spread(cases: Sequence[Case], count: int | None) -> list[Case]:
    """At most ``count`` cases that still show every claim that any of them shows, as far as the count allows."""
    if count is None or len(cases) <= count:
        return list(cases)
    showing, rest = _by_gain(cases, count)
    missing = count - len(showing)
    return showing + [rest[i * len(rest) // missing] for i in range(missing)]


def most_telling_first(cases: Sequence[Case]) -> list[Case]:
    """The cases, those in front that show all there is to show: what comes early enough in a run that is cut off."""
    showing, rest = _by_gain(cases, len(cases))
    return showing + rest


def _by_gain(cases: Sequence[Case], most: int) -> tuple[list[Case], list[Case]]:
    """Cases that each show something more than those before it, ``most`` at most, and the others in their order."""
    chosen: list[Case] = []
    seen: set[str] = set()
    rest = [(case, aspects(case)) for case in cases]
    while rest and len(chosen) < most:
        gains = [len(shown - seen) for _, shown in rest]
        if not max(gains):
            break
        case, shown = rest.pop(gains.index(max(gains)))
        chosen.append(case)
        seen |= shown
    return chosen, [case for case, _ in rest]


def aspects(case: Case) -> frozenset[str]:
    """What a case shows: its claims, each in its mode."""
    return frozenset(f"{claim} in {case.mode}" for claim in case.claims())


def ladder(ground: Ground) -> Iterator[Case]:
    """The plain case, and those one step away from it."""
    plain, clause = ground.plain(), ground.clause
    yield plain
    changes = {**dict(sorted(_steps_of_features(ground).items())), **_rest_of(_dimensions(ground))}
    for name, values in changes.items():
        for value in values:
            case = _changed(plain, {name: value}, ground)
            yield several_requests(case) if name in _BETWEEN_REQUESTS else case
    for row in _together(ground):
        yield _changed(plain, row, ground)
    if clause.kind == "mha":  # the scale of an MLA layer is never that of its width
        yield _rescaled(plain)
    if ground.mode == "ragged":
        return
    batch = several_requests(replace(plain, memory="shuffled"))
    for option in ("steps", "flight"):
        yield replace(batch, options=batch.options | {option})
    for kinds in _several_kinds(plain.kinds[0], clause, plain.page_size):
        yield with_encoders(replace(batch, kinds=kinds))


def _together(ground: Ground) -> Iterator[Row]:
    """Pairs that belong together: the LSE with what changes it, an fp8 cache with what it cannot hold."""
    features = _steps_of_features(ground)
    if "lse" in features:
        yield from ({"lse": True, name: features[name][0]} for name in _CHANGE_THE_LSE if name in features)
    if ground.mode != "ragged":
        yield from ({"kv_dtype": name, "hot": True} for name in ground.clause.kv_dtypes if name != "auto")


#: Features that change the denominator of the softmax.
_CHANGE_THE_LSE: Final = ("sliding_window", "softcap", "sinks", "bidirectional_spans", "cross", "ragged")


def pairs(ground: Ground) -> Iterator[Case]:
    """A covering array over everything at once: dimensions, features, memory, data and the ways to call."""
    features = {name: [None, *values] for name, values in _steps_of_features(ground).items() if name not in _ALONE}
    table: dict[str, list[Any]] = {**_dimensions(ground), **features}
    if ground.tier == "contract" and ground.mode in ("mixed", "draft_extend", "ragged"):
        table = {name: values[:2] for name, values in table.items()}
    plain = ground.plain()
    for i, row in enumerate(covering_rows(table, lambda row: _allowed(row, ground), seed=ground.seed)):
        case = replace(_changed(plain, row, ground), seed=ground.seed + 1)
        yield _rescaled(case) if ground.clause.kind == "mha" and i % _EVERY == 1 else case


#: How many rows of a covering array there are for one whose scale is the model's own.
_EVERY: Final = 3


def _rescaled(case: Case) -> Case:
    """The case with another scale than the width of its keys gives."""
    *others, kind = case.kinds
    return replace(case, kinds=(*others, replace(kind, scale=axes.other_scale(kind.qk_head_dim))))


def graphs(ground: Ground) -> Iterator[Case]:
    """Graphs with everything that changes what is captured; in the first tier with one feature at a time."""
    features = _steps_of_features(ground)
    if "cuda_graph" not in features:
        return
    others = {name: values for name, values in features.items() if name not in _ALONE}
    dimensions = {name: values for name, values in _dimensions(ground).items() if name in _CAPTURED}
    if ground.tier == "contract":
        rows = [{name: values[0]} for name, values in others.items()]
        rows += [{name: value} for name, values in dimensions.items() for value in values[1:]]
    else:
        table = {**dimensions, **{name: [None, *values] for name, values in others.items()}}
        rows = covering_rows(table, lambda row: _allowed(row, ground), seed=ground.seed)
    for row in rows:
        yield several_requests(_changed(ground.plain(), {**row, "cuda_graph": True, "memory": "shuffled"}, ground))


#: Features that are proved by cases of their own kind.
_ALONE: Final = ("cuda_graph",)
#: Axes that change what a graph captures.
_CAPTURED: Final = ("dtype", "kv_dtype", "head_dim", "group_size", "page_size", "layout", "nohost")


def _dimensions(ground: Ground) -> dict[str, list[Any]]:
    """The axes every backend has, each with the plain value first."""
    clause, tier = ground.clause, ground.tier
    names = list(axes.request_patterns(ground.mode, ground.page_size, ground.draft_tokens))
    table: dict[str, list[Any]] = {
        "pattern": [n for n in names if tier != "contract" or n != "batch_33" or ground.mode in ("decode", "extend")],
        "dtype": axes.dtypes(clause),
        "head_dim": axes.head_dims(clause, tier),
        "group_size": axes.group_sizes(clause),
        "hot": [None, True],
        "fused": [None, True],
        "out": [None, True],
    }
    if ground.mode != "ragged":
        table |= {
            "kv_dtype": sorted(clause.kv_dtypes, key=lambda name: name != "auto"),
            "page_size": [*axes.page_sizes(clause, tier), *axes.split_page_sizes(clause)],
            "layout": list(clause.kv_layouts),
            "memory": list(MEMORIES),
            "wrapped": [None, "stacked", "joined"] if clause.kind == "mha" else [None, "joined"],
            "write": [None, "nosave", "decoy", "holes"],
            "loose": [None, True],
        }
        if not ground.manifest.needs_host_lengths:
            table["nohost"] = [None, True]
    return table


def _rest_of(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The axes without their plain values."""
    return {name: values[1:] for name, values in table.items()}


def _steps_of_features(ground: Ground) -> dict[str, list[Any]]:
    """The features of the clause that mean something in this mode, each with the values that turn it on."""
    page, mode = ground.page_size, ground.mode
    windows = (
        [max(2, page - 1), page, 1, ENDLESS_WINDOW]
        if mode == "decode"
        else [page, 1, max(2, page // 2), ENDLESS_WINDOW]
    )
    table: dict[str, list[Any]] = {
        "sliding_window": list(dict.fromkeys(windows)),
        "softcap": [SOFTCAP],
        "sinks": [True],
        "lse": [True],
        "deterministic": [True],
        "batch_invariant": [True],
        "bidirectional_spans": [True] if mode in ("extend", "mixed") else [],
        "cross": [True] if mode in ("extend", "decode", "mixed") else [],
        "ragged": ["full"] if mode == "ragged" else [],
        "cuda_graph": [True] if mode in ("decode", "verify") else [],
    }
    return {name: values for name, values in table.items() if values and name in ground.clause.features}


def _allowed(row: Row, ground: Ground) -> bool:
    """Whether the values of a row can stand together."""
    on = {name for name, value in row.items() if value is not None}
    positionless = "cross" in on or row.get("ragged") == "full"
    if positionless and ("sliding_window" in on or "bidirectional_spans" in on):
        return False
    if "cross" in on and row.get("write") == "holes":
        return False
    if row.get("pattern") == "batch_33" and row.get("page_size", 0) > _LARGEST_PAGE_OF_MANY:
        return False
    stacked_mla = ground.clause.kind == "mla" and row.get("wrapped") == "stacked"
    splits = row.get("page_size") is not None and not ground.clause.pages.allows(row["page_size"])
    return not stacked_mla and not (splits and ("wrapped" in on or row.get("layout") == "HND"))


_OPTION_OF: Final = {
    "lse": "lse",
    "deterministic": "twice",
    "batch_invariant": "alone",
    "bidirectional_spans": "spans",
    "cuda_graph": "graph",
    "hot": "hot",
    "fused": "fused",
    "out": "out",
    "nohost": "nohost",
    "loose": "loose",
}


def _changed(case: Case, row: Row, ground: Ground) -> Case:
    """``case`` with the values of ``row``; None leaves an axis plain. Request lengths follow the page size."""
    row = {name: value for name, value in row.items() if value is not None}
    kind = case.kinds[-1]
    widths = row.get("head_dim", (kind.qk_head_dim, kind.v_head_dim))
    kind = replace(
        axes.layer_kind(ground.clause, widths, row.get("group_size", kind.group_size)),
        sliding_window=row.get("sliding_window", kind.sliding_window),
        softcap=row.get("softcap", kind.softcap),
        sinks=row.get("sinks", kind.sinks),
        cross=row.get("cross", kind.cross),
        ragged=kind.ragged,
        causal=row.get("ragged") != "full",
    )
    options = {_OPTION_OF[name] for name in row if name in _OPTION_OF}
    options |= {row[name] for name in ("wrapped", "write") if name in row}
    plain_names = ("dtype", "kv_dtype", "page_size", "layout", "memory")
    case = replace(
        case,
        kinds=(*case.kinds[:-1], kind),
        options=case.options | options,
        **{name: row[name] for name in plain_names if name in row},
    )
    return with_encoders(with_pattern(case, row.get("pattern", "plain"), ground.draft_tokens))


def with_pattern(case: Case, name: str, draft_tokens: int) -> Case:
    """The case with the batch that ``name`` means at its page size."""
    batch, pattern = axes.request_patterns(case.mode, case.page_size, draft_tokens)[name]
    return replace(case, batch=batch, pattern=pattern)


def several_requests(case: Case) -> Case:
    """The case with a batch of several requests of different lengths."""
    name = "batch" if case.mode == "draft_extend" else "seven"
    return with_encoders(with_pattern(case, name, case.draft_tokens))


def with_encoders(case: Case) -> Case:
    """Encoder lengths for every request, if a layer asks for them."""
    if not any(kind.cross for kind in case.kinds):
        return case
    _, pattern = axes.with_encoder((case.batch, case.pattern), case.page_size)
    return replace(case, pattern=pattern)


def _several_kinds(kind: LayerKind, clause: Clause, page: int) -> Iterator[tuple[LayerKind, ...]]:
    """Layers that one step mixes: the same kind twice, and the features that models alternate."""
    has = clause.features.__contains__
    yield kind, kind
    if has("sliding_window"):
        short, long = replace(kind, sliding_window=max(2, page // 2)), replace(kind, sliding_window=page + 1)
        yield kind, short, kind
        yield short, long
        if has("softcap"):
            yield replace(short, softcap=SOFTCAP), replace(kind, softcap=SOFTCAP)
        if has("sinks"):
            yield replace(short, sinks=True), replace(kind, sinks=True)
    if has("cross"):
        yield kind, replace(kind, cross=True), kind


def cached_clause(ground: Ground) -> Clause | None:
    """The clause that gives a backend its cache: this one, or one that can stand beside a ragged clause."""
    if ground.clause.cached:
        return ground.clause
    fits: Callable[[Clause], bool] = lambda c: (  # noqa: E731 - a predicate of one line
        c.cached and "prefill" in c.phases and bool({*c.dtypes} & {*ground.clause.dtypes})
    )
    return next((clause for clause in ground.manifest.clauses if fits(clause)), None)


def beside_a_cache(ground: Ground, case: Case) -> Case:
    """A ragged case: a cached kind that does not run gives the backend its cache, then the ragged kind."""
    ragged = replace(case.kinds[0], ragged=True)
    clause = cached_clause(ground)
    if clause is None:
        return replace(case, kinds=(ragged,))
    cached = axes.layer_kind(clause, axes.head_dims(clause, ground.tier)[0], axes.group_sizes(clause)[0])
    shared = [name for name in axes.dtypes(ground.clause) if name in clause.dtypes]
    return replace(case, kinds=(cached, ragged), dtype=shared[0], layout=clause.kv_layouts[0])
