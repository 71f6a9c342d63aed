"""What a clause leaves open, as the values worth trying: edges of ranges, odd sizes, request lengths around a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, Literal, get_args

from attn_core.planning.claims import HeadDims, Widths
from attn_core.planning.config import LayerKind
from attn_core.planning.manifest import Clause
from attn_core.testing.cases import Mode, Request

Tier = Literal["contract", "numerics", "stress"]
#: Each tier runs what the ones before it run, and more.
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)

#: Query heads for each KV head that must work everywhere: no power of two, and what models have.
GROUP_SIZES: Final = (4, 1, 3, 7, 8, 16)
#: The most exact dtype first: the plainest case should see the smallest fault.
_DTYPE_ORDER: Final = ("float32", "float16", "bfloat16")
#: Page sizes to try where a rule allows many; the first is the plain one.
_PAGES: Final[dict[Tier, Sequence[int]]] = {
    "contract": (16, 1, 3, 64),
    "numerics": (16, 1, 3, 64, 2, 48, 128, 256),
    "stress": (16, 1, 3, 64, 2, 48, 128, 256, 5, 512),
}
_LARGEST_PAGE: Final = 1024
#: Page sizes of which some backend has only a divisor.
_SPLIT_PAGES: Final = (48, 16, 128, 96, 256)
#: Head widths (keys, values) to try where a clause allows any.
_ANY_MHA: Final[dict[Tier, Sequence[tuple[int, int]]]] = {
    "contract": ((64, 64), (24, 24), (40, 16)),
    "numerics": ((64, 64), (24, 24), (40, 16), (80, 80), (128, 128), (192, 128), (256, 256)),
    "stress": ((64, 64), (24, 24), (40, 16), (80, 80), (128, 128), (192, 128), (256, 256), (16, 48), (512, 512)),
}
_ANY_MLA: Final = ((576, 512), (80, 64))
_LARGEST_WIDTH: Final = 576


def dtypes(clause: Clause) -> list[str]:
    """The clause's dtypes, the most exact first."""
    return [name for name in _DTYPE_ORDER if name in clause.dtypes]


def group_sizes(clause: Clause) -> list[int]:
    """Group sizes that every backend must have, up to the clause's own bound; the plain one first."""
    bound = clause.max_group_size or max(GROUP_SIZES)
    sizes = [n for n in GROUP_SIZES if n <= bound]
    return sizes if bound in sizes or clause.max_group_size is None else [*sizes, bound]


def page_sizes(clause: Clause, tier: Tier) -> list[int]:
    """Every page size that the clause lists, or those worth trying of its rules; the plain one first."""
    rules = [rule for group in clause.pages.groups for rule in group]
    if rules and all(rule.min == rule.max for rule in rules):
        listed = [n for n in clause.pages if n <= _LARGEST_PAGE] or [next(iter(clause.pages))]
        return sorted(listed, key=lambda n: (n != 16, n))
    edges = [edge for rule in rules for edge in (rule.min, rule.multiple_of, rule.max)]
    tried = [*_PAGES[tier], *(n for n in edges if n <= _LARGEST_PAGE)]
    return [n for n in dict.fromkeys(tried) if clause.pages.allows(n)] or [next(iter(clause.pages))]


def split_page_sizes(clause: Clause) -> list[int]:
    """A page size that the clause has not, and is served by splitting its pages; none where it has all of them."""
    found = (n for n in _SPLIT_PAGES if not clause.pages.allows(n) and clause.pages.largest_divisor(n))
    return list(islice(found, 1)) if {"NHD", "MLA"} & {*clause.kv_layouts} else []


def head_dims(clause: Clause, tier: Tier) -> list[tuple[int, int]]:
    """Every pair of widths (keys, values) that the clause lists, and the edges of its ranges; the plain one first."""
    if not clause.head_dims.entries:
        return list(_ANY_MLA if clause.kind == "mla" else _ANY_MHA[tier])
    pairs = list(dict.fromkeys(pair for entry in clause.head_dims.entries for pair in _edges(entry)))
    if clause.kind == "mla":
        pairs = [(qk, v) for qk, v in pairs if v < qk]
    pairs = [pair for pair in pairs if clause.head_dims.allows(*pair)]
    return sorted(pairs, key=lambda pair: (pair != (64, 64), pair != (128, 128)))


def _edges(entry: tuple[Widths, Widths, bool]) -> list[tuple[int, int]]:
    keys, values, same = entry
    if same:
        return [(n, n) for n in _ends(keys)]
    return [(qk, v) for qk in _ends(keys) for v in _ends(values)]


def _ends(widths: Widths) -> list[int]:
    """The smallest and the largest width, one between, and 64 and 80 where they are allowed."""
    top = min(widths.max or _LARGEST_WIDTH, max(_LARGEST_WIDTH, widths.min))
    allowed = [n for n in range(widths.min, top + 1) if widths.allows(n)]
    wanted = [allowed[0], allowed[-1], *(n for n in (64, 80, 128) if n in allowed)] if allowed else []
    return list(dict.fromkeys(wanted))


def undeclared_head_dims(dims: HeadDims, kind: str) -> tuple[int, int] | None:
    """A pair of widths that nobody's list has, None if the clause takes any."""
    tried: Iterable[tuple[int, int]] = ((n + 8, n) for n in (24, 40, 72)) if kind == "mla" else (
        (n, n) for n in (72, 36, 12, 640, 33)
    )  # fmt: skip
    return next((pair for pair in tried if not dims.allows(*pair)), None)


def layer_kind(clause: Clause, widths: tuple[int, int], group: int) -> LayerKind:
    """A layer of the clause's kind; two KV heads, so that heads can be mixed up."""
    kv_heads = 1 if clause.kind == "mla" else 2
    qk, v = widths
    # the scale of an MLA model counts the unabsorbed width; any that is not qk^-0.5 will do
    scale = 0.125 if clause.kind == "mla" else None
    return LayerKind(group * kv_heads, kv_heads, qk, v, kind=clause.kind, scale=scale)


def other_scale(width: int) -> float:
    """A scale for heads of this width that is not the usual one: models have their own (Gemma, Granite, PaliGemma)."""
    return float(round(1.5 * width**-0.5, 3))


Pattern = tuple[int, tuple[Request, ...]]


def request_patterns(mode: Mode, page: int, draft_tokens: int) -> dict[str, Pattern]:
    """Named batches (size, requests) for a mode, with lengths around the page size; ``plain`` fills its pages exactly.

    Lengths 1, page - 1, page, page + 1 and several pages; batch sizes 1, 2, 7 and 33; prefixes and none.
    """
    unit = page if page > 1 else 5
    if mode == "decode":
        return _decode_patterns(unit)
    if mode == "verify":
        return _verify_patterns(unit, draft_tokens)
    if mode == "mixed":
        return _mixed_patterns(unit)
    if mode == "ragged":
        return _extend_patterns(unit) | {"fewer_keys": (4, _requests((4, 0), (3, -3), (5, -2), (2, 3)))}
    if mode == "draft_extend":
        catching_up = _requests((1, unit), (3, unit - 1), (2, 5), (4, 2 * unit + 1))
        two = _requests((2, 2 * unit - 2), (2, 3 * unit - 2))
        return {"plain": (1, two[:1]), "two": (2, two), "batch": (4, catching_up), "batch_33": (33, catching_up)}
    return _extend_patterns(unit)


def _decode_patterns(unit: int) -> dict[str, Pattern]:
    lengths = [1, unit - 1, unit, unit + 1, 3 * unit + 5, 2, 2 * unit]
    edges = _requests(*((1, n - 1) for n in lengths if n > 0))
    return {
        "plain": (1, _requests((1, 2 * unit - 1))),
        "first_token": (1, _requests((1, 0))),
        "partial_page": (1, _requests((1, unit))),
        "two": (2, _requests((1, unit - 1), (1, 2 * unit - 1))),
        "seven": (7, edges),
        "long": (1, _requests((1, 4 * unit + 130))),
        "batch_33": (33, edges),
    }


def _extend_patterns(unit: int) -> dict[str, Pattern]:
    edges = _requests(
        (1, 0), (unit - 1, 0), (unit, 1), (unit + 1, unit - 1), (3, unit), (2, 2 * unit + 1), (1, unit)
    )  # fmt: skip
    return {
        "plain": (1, _requests((2 * unit, 0))),
        "partial_page": (1, _requests((unit + 1, 0))),
        "prefix": (1, _requests((unit, unit))),
        "two": (2, _requests((unit, 0), (2 * unit, 0))),
        "seven": (7, edges),
        "empty": (3, _requests((3, 2), (0, unit), (5, 0))),
        "long": (1, _requests((2 * unit + 5, 2 * unit + 100))),
        "batch_33": (33, _requests((1, 0), (2, 3), (3, unit - 1), (1, unit), (4, 1))),
    }


def _mixed_patterns(unit: int) -> dict[str, Pattern]:
    decodes = _requests((1, unit - 1), (1, unit), (1, 0), (1, 2 * unit + 1))
    extends = _requests((unit + 1, 0), (3, unit - 1), (2, 3))
    return {
        "plain": (2, _requests((1, unit - 1), (unit, 0))),
        "prefix": (2, _requests((1, 2 * unit - 1), (unit, unit))),
        "only_decodes": (2, decodes[:2]),
        "seven": (7, decodes + extends),
        "batch_33": (33, decodes * 4 + (extends * 6)[:17]),
    }


def _verify_patterns(unit: int, q: int) -> dict[str, Pattern]:
    plain = next(n * unit for n in range(2, 10) if n * unit > q) - q
    edges = _requests((q, 1), (q, unit - 1), (q, unit), (q, unit + 1), (q, 0), (q, 3 * unit + 2), (q, 2 * unit - 2))
    return {
        "plain": (1, _requests((q, plain))),
        "partial_page": (1, _requests((q, unit))),
        "two": (2, _requests((q, plain), (q, plain + unit))),
        "seven": (7, edges),
        "long": (1, _requests((q, 3 * unit + 130))),
        "batch_33": (33, edges),
    }


def _requests(*pairs: tuple[int, int]) -> tuple[Request, ...]:
    return tuple(Request(new, prefix) for new, prefix in pairs)


def with_encoder(pattern: Pattern, page: int) -> Pattern:
    """The same requests, each with an encoder: 1, page - 1, page, page + 1 or several pages of keys, in turn."""
    lengths = [n for n in (page + 1, page, 2 * page + 3, max(1, page - 1), 1) if n > 0]
    batch, requests = pattern
    return batch, tuple(Request(r.new, r.prefix, lengths[i % len(lengths)]) for i, r in enumerate(requests))
