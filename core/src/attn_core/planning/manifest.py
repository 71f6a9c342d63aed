"""What a backend claims: Manifest and Clause, parsed from the TOML beside its code, never from the code."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, cast, get_args

from attn_core.errors import ManifestError, nearest
from attn_core.planning.claims import ANY_ARCH, NO_PAGES, ArchSpec, HeadDims, PageRule, PageSet, Widths
from attn_core.planning.config import DTYPES, FEATURES, KV_DTYPES, KV_LAYOUTS, MAX_PAGE_SIZE, PHASES, Kind, Phase
from attn_core.planning.tables import Table
from attn_core.planning.versions import Requirement, Specifier

#: The version of the contract that this core speaks; apart from package versions.
PROTOCOL_VERSION: Final = "1.0"
#: The newest manifest schema that this core reads.
SCHEMA_VERSION: Final = 1
DEVICES: Final = ("cpu", "cuda", "rocm", "npu", "xpu", "any")
KINDS: Final[tuple[str, ...]] = get_args(Kind)

_TOP_KEYS: Final = ("schema", "name", "protocol", "summary", "requires", "fallback", "supports")
_REQUIRES_KEYS: Final = ("dists", "host_lengths")
_CLAUSE_KEYS: Final = (
    "phases", "device", "arch", "kind", "dtypes", "kv_dtypes", "head_dims", "page_sizes", "kv_layouts", "features",
    "max_group_size", "max_draft_tokens", "quantizes_query",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that a backend can do; a request is accepted if a single clause accepts all of it.

    ``pages`` is the set of native page sizes in tokens. A clause without ``page_sizes`` has no cache: it takes
    `ragged` layers only (``pages`` and ``kv_layouts`` are then empty).
    ``max_group_size`` bounds the query heads for each KV head, ``max_draft_tokens`` the draft tokens of a verify step.
    ``quantizes_query`` says that with an fp8 cache the kernel rounds queries and probabilities to fp8 as well: it is
    held to the tolerance of that arithmetic, and a user can read it.
    """

    phases: tuple[Phase, ...]
    devices: tuple[str, ...]
    kind: Kind
    dtypes: tuple[str, ...]
    head_dims: HeadDims
    arch: ArchSpec = ANY_ARCH
    kv_dtypes: tuple[str, ...] = ("auto",)
    pages: PageSet = NO_PAGES
    kv_layouts: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    max_group_size: int | None = None
    max_draft_tokens: int | None = None
    quantizes_query: bool = False

    @property
    def cached(self) -> bool:
        """Whether the clause takes layers with a paged cache."""
        return bool(self.kv_layouts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backend is and claims: the parsed ``<name>.toml``.

    ``requires_dists`` are the distributions it cannot run without, ``needs_host_lengths`` says that it reads
    ``seq_lens_cpu`` and ``query_start_loc_cpu`` of a batch. ``fallback`` gives, for a phase that no clause has, the
    backends to ask instead, in order.
    """

    name: str
    schema: int
    protocol: Specifier
    summary: str
    clauses: tuple[Clause, ...]
    requires_dists: tuple[Requirement, ...] = ()
    needs_host_lengths: bool = False
    fallback: Mapping[Phase, tuple[str, ...]] = field(default_factory=dict, hash=False)
    source: str = field(default="", compare=False)

    @classmethod
    def parse(cls, data: str | Mapping[str, Any], *, source: str = "<manifest>") -> Manifest:
        """From TOML text, or from the same as a mapping. ``source`` names it in errors.

        Raises ManifestError for TOML that cannot be read, a newer schema, an unknown key or value (with the nearest
        known one), a missing key, or a value of the wrong type.
        """
        if isinstance(data, str):
            try:
                data = tomllib.loads(data)
            except tomllib.TOMLDecodeError as error:
                raise ManifestError(f"{source} is not TOML: {error}", hint="correct the place that is named") from error
        return _manifest(Table(source, "", data))

    @property
    def phases(self) -> frozenset[Phase]:
        """The phases that some clause has, on any device."""
        return frozenset(phase for clause in self.clauses for phase in clause.phases)

    @property
    def features(self) -> frozenset[str]:
        """The features that some clause has."""
        return frozenset(name for clause in self.clauses for name in clause.features)

    @property
    def speaks_protocol(self) -> bool:
        """Whether it was built for a contract that this core speaks."""
        return self.protocol.allows(PROTOCOL_VERSION)


#: The headline flags in the order of the published matrix: key -> what a person reads.
HEADLINE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "page_size_gt_1": "Page size > 1",
        "spec_decoding": "Spec decoding",
        "mla": "MLA",
        "sliding_window": "Sliding window",
        "multimodal": "Multimodal",
    }
)


def headline(manifest: Manifest) -> dict[str, bool]:
    """The five headline flags, each from the clauses alone.

    - ``page_size_gt_1``: a page size above 1 is native (what conversion serves does not count);
    - ``spec_decoding``: the verify phase, with chains or trees of draft tokens;
    - ``mla``: MLA layers over the paged latent;
    - ``sliding_window``: windows, in prefill or decode;
    - ``multimodal``: something that only models with images or sound ask of attention: tokens of an image that see
      each other, keys of an encoder, or the encoder's own attention (`ragged`, keys as wide as values: the ragged form
      of expanded MLA, 192/128, is not one).
    """
    clauses = manifest.clauses
    return {
        "page_size_gt_1": any(size > 1 for clause in clauses for size in _first_two(clause.pages)),
        "spec_decoding": any("verify" in c.phases and c.features & {"verify_chain", "verify_tree"} for c in clauses),
        "mla": any(c.kind == "mla" and c.cached for c in clauses),
        "sliding_window": any("sliding_window" in c.features and {"prefill", "decode"} & {*c.phases} for c in clauses),
        "multimodal": any("prefill" in c.phases and _takes_media(c) for c in clauses),
    }


def _first_two(pages: PageSet) -> Iterable[int]:
    return [size for size, _ in zip(pages, range(2), strict=False)]


def _takes_media(clause: Clause) -> bool:
    return bool(clause.features & {"bidirectional_spans", "cross"}) or (
        clause.kind == "mha" and "ragged" in clause.features and clause.head_dims.any_square
    )


def _manifest(top: Table) -> Manifest:
    schema = top.get("schema", int, f"schema = {SCHEMA_VERSION}")
    if schema != SCHEMA_VERSION:
        newer = schema > SCHEMA_VERSION
        raise top.error(
            "schema",
            f"is {schema}; this core reads schema {SCHEMA_VERSION}",
            str(SCHEMA_VERSION),
            "upgrade attn-core: pip install --upgrade attn-core" if newer else f"write schema = {SCHEMA_VERSION}",
        )
    top.only(_TOP_KEYS)
    name = top.get("name", str, "the backend's name")
    if not name.isidentifier():
        raise top.error("name", f"is {name!r}", "letters, digits and underscores, as in an identifier")
    requires = top.table("requires")
    requires.only(_REQUIRES_KEYS)
    supports = top.get("supports", list, "one [[supports]] table for each clause")
    if not supports or not all(isinstance(entry, dict) for entry in supports):
        raise top.error("supports", "has no clause", "one [[supports]] table for each clause")
    return Manifest(
        name=name,
        schema=schema,
        protocol=_protocol(top),
        summary=top.get("summary", str, "one line for people"),
        clauses=tuple(_clause(Table(top.source, f"supports[{i}]", entry)) for i, entry in enumerate(supports)),
        requires_dists=_requirements(requires),
        needs_host_lengths=requires.get("host_lengths", bool, "true or false", False),
        fallback=_fallback(top.table("fallback"), name),
        source=top.source,
    )


def _protocol(top: Table) -> Specifier:
    text = top.get("protocol", str, "bounds on the protocol version, such as '>=1.0,<2'")
    try:
        specifier = Specifier.parse(text)
    except ValueError as error:
        raise top.error("protocol", f"is {text!r}: {error}", "bounds such as '>=1.0,<2'") from error
    if not specifier.bounds:
        raise top.error("protocol", "is empty", "bounds such as '>=1.0,<2'")
    return specifier


def _requirements(requires: Table) -> tuple[Requirement, ...]:
    texts = requires.get("dists", list, "a list such as ['flashinfer-python>=0.6']", [])
    try:
        return tuple(Requirement.parse(text) for text in texts)
    except (ValueError, AttributeError) as error:
        raise requires.error(
            "dists", f"is {texts!r}: {error}", "names with bounds: 'name>=1.0', 'name | other>=2'"
        ) from error


def _fallback(table: Table, own: str) -> Mapping[Phase, tuple[str, ...]]:
    table.only(PHASES)
    chains: dict[Phase, tuple[str, ...]] = {}
    for phase in PHASES:
        if phase in table.data:
            names = table.get(phase, list, "a list of backend names")
            if not names or not all(isinstance(name, str) for name in names) or own in names:
                raise table.error(phase, f"is {names!r}", "names of other backends, the first that can is used")
            chains[phase] = tuple(names)
    return chains


def _clause(table: Table) -> Clause:
    table.only(_CLAUSE_KEYS)
    kind = table.get("kind", str, " or ".join(KINDS))
    if kind not in KINDS:
        raise table.error("kind", f"is {kind!r}", KINDS)
    features = frozenset(table.chosen("features", FEATURES, ()))
    return Clause(
        phases=cast(tuple[Phase, ...], table.chosen("phases", PHASES)),
        devices=_devices(table),
        kind=cast(Kind, kind),
        dtypes=table.chosen("dtypes", DTYPES),
        head_dims=_head_dims(table),
        arch=_arch(table),
        kv_dtypes=table.chosen("kv_dtypes", KV_DTYPES, ("auto",)),
        pages=_pages(table, features),
        kv_layouts=_layouts(table, kind),
        features=features,
        max_group_size=table.positive("max_group_size"),
        max_draft_tokens=table.positive("max_draft_tokens"),
        quantizes_query=table.get("quantizes_query", bool, "true or false", False),
    )


def _devices(table: Table) -> tuple[str, ...]:
    if isinstance(table.data.get("device"), str):
        table = Table(table.source, table.path, {**table.data, "device": [table.data["device"]]})
    return table.chosen("device", DEVICES)


def _arch(table: Table) -> ArchSpec:
    if "arch" not in table.data:
        return ANY_ARCH
    try:
        return ArchSpec.parse(table.data["arch"])
    except ValueError as error:
        raise table.error("arch", f"is {table.data['arch']!r}", str(error)) from error


def _layouts(table: Table, kind: str) -> tuple[str, ...]:
    if "page_sizes" not in table.data:
        if "kv_layouts" in table.data:
            raise table.error(
                "kv_layouts", "is given, but no page_sizes", hint="a cache needs both; a ragged-only clause neither"
            )
        return ()
    layouts = table.chosen("kv_layouts", KV_LAYOUTS, ("MLA",) if kind == "mla" else None)
    fitting = {"MLA"} if kind == "mla" else {"NHD", "HND"}
    if not set(layouts) <= fitting:
        raise table.error("kv_layouts", f"is {list(layouts)!r} in a clause of kind {kind!r}", sorted(fitting))
    return layouts


_HEAD_DIMS: Final = (
    "'any', or a list of [qk, v] pairs and of tables {{ min = 32, max = 256, multiple_of = 8 }}".format()
)


def _head_dims(table: Table) -> HeadDims:
    value = table.data.get("head_dims")
    if value == "any":
        return HeadDims()
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise table.error("head_dims", f"is {value!r}" if value is not None else "is missing", _HEAD_DIMS)
    return HeadDims(tuple(_head_dim(table, entry) for entry in entries))


def _head_dim(table: Table, entry: object) -> tuple[Widths, Widths, bool]:
    if isinstance(entry, list) and len(entry) == 2 and all(type(n) is int and n > 0 for n in entry):
        return Widths(entry[0], entry[0]), Widths(entry[1], entry[1]), False
    if isinstance(entry, dict) and set(entry) == {"qk", "v"}:
        return _widths(table, entry["qk"]), _widths(table, entry["v"]), False
    if isinstance(entry, dict):
        widths = _widths(table, entry)
        return widths, widths, True
    raise table.error("head_dims", f"has {entry!r}", _HEAD_DIMS)


def _widths(table: Table, entry: object) -> Widths:
    if type(entry) is int and entry > 0:
        return Widths(entry, entry)
    rule = _rule(table, "head_dims", entry, ("min", "max", "multiple_of"))
    return Widths(rule.get("min", 1), rule.get("max"), rule.get("multiple_of", 1))


def _pages(table: Table, features: frozenset[str]) -> PageSet:
    if "page_sizes" not in table.data:
        if "ragged" not in features:
            raise table.error(
                "page_sizes", "is missing", "page sizes; only a clause with the feature 'ragged' can do without a cache"
            )
        return NO_PAGES
    value = table.data["page_sizes"]
    if value == "any":
        return PageSet()
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise table.error(
            "page_sizes", f"is {value!r}", "'any', or a list of integers and tables such as { multiple_of = 16 }"
        )
    pages = PageSet((tuple(_page_rule(table, entry) for entry in entries),))
    if not pages:
        raise table.error("page_sizes", f"is {value!r}, which allows none", f"sizes from 1 to {MAX_PAGE_SIZE}")
    return pages


def _page_rule(table: Table, entry: object) -> PageRule:
    if type(entry) is int and 1 <= entry <= MAX_PAGE_SIZE:
        return PageRule(min=entry, max=entry)
    rule = _rule(table, "page_sizes", entry, ("min", "max", "multiple_of", "power_of_two"))
    return PageRule(**rule)


def _rule(table: Table, key: str, entry: object, known: tuple[str, ...]) -> dict[str, Any]:
    """A table of bounds: integers from 1, and ``power_of_two = true``."""
    if not isinstance(entry, dict) or not entry:
        raise table.error(key, f"has {entry!r}", f"an integer from 1, or a table of: {', '.join(known)}")
    for name, value in entry.items():
        if name not in known:
            near = nearest(name, known)
            raise table.error(key, f"has the unknown key {name!r}", known, f"did you mean {near!r}?" if near else None)
        good = value is True if name == "power_of_two" else type(value) is int and value > 0
        if not good:
            raise table.error(key, f"has {name} = {value!r}", "true" if name == "power_of_two" else "an integer from 1")
    if entry.get("min", 1) > entry.get("max", MAX_PAGE_SIZE):
        raise table.error(key, f"has {entry!r}", "min at most max")
    return dict(entry)
