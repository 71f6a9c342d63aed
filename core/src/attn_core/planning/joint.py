"""The phases share one cache: choosing backends, page size and layout together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm

from attn_core.errors import NoCommonCacheError
from attn_core.planning.claims import PageSet
from attn_core.planning.config import MAX_PAGE_SIZE, AttentionConfig, Phase
from attn_core.planning.discovery import BackendRef
from attn_core.planning.reasons import LAYOUT_ORDER, PAGE_ORDER, Decision


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend that can run a phase, why it has its place, and the fallback links that lead to it."""

    ref: BackendRef
    decision: Decision
    why: str
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Joint:
    """One choice for each phase, and the cache that all of them can use."""

    choices: Mapping[Phase, Choice]
    page_size: int
    layout: str


def choose(config: AttentionConfig, choices: Mapping[Phase, Sequence[Choice]]) -> Joint:
    """The combination with the smallest sum of places that has a page size and a layout in common.

    Equal sums: the fewer different backends, then the better prefill. Raises NoCommonCacheError if there is none.
    """
    for combination in _combinations(choices):
        cache = common_cache(config, [choice.decision for choice in combination.values()])
        if cache is not None:
            return Joint(combination, *cache)
    raise NoCommonCacheError(
        f"the phases of {config.model or 'this config'} share one cache, and no choice of backends has one in common",
        given=config.page_size,
        trace=[f"  {phase}: {side}" for phase, found in choices.items() for side in map(describe, found)],
        hint="name another backend for one phase" + (", or leave the page size free" if config.page_size else ""),
    )


def _combinations(choices: Mapping[Phase, Sequence[Choice]]) -> Iterator[dict[Phase, Choice]]:
    places = product(*(range(len(found)) for found in choices.values()))

    def cost(combination: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        listed = {found[i].ref.listed for found, i in zip(choices.values(), combination, strict=True)}
        return sum(combination), len(listed), combination

    for combination in sorted(places, key=cost):
        yield {phase: found[i] for (phase, found), i in zip(choices.items(), combination, strict=True)}


def common_cache(config: AttentionConfig, decisions: Sequence[Decision]) -> tuple[int, str] | None:
    """The page size and layout that all ``decisions`` can use, None if there is none.

    What the config gives is kept. Where it is free: the fewest phases that need a conversion, then the layout in the
    order NHD, HND, MLA, then the page size in the order of PAGE_ORDER (others after it, ascending).
    """
    shared = [layout for layout in LAYOUT_ORDER if all(layout in decision.layouts for decision in decisions)]
    best: tuple[tuple[int, int, int], tuple[int, str]] | None = None
    for layout in shared:
        pages = [pages for decision in decisions for name, pages in decision.caches if name == layout]
        sizes = [config.page_size] if config.page_size is not None else list(dict.fromkeys(_sizes(pages)))
        for place, size in enumerate(sizes):
            native = [decision.native_for(size, layout) for decision in decisions]
            if None in native:
                continue
            cost = (sum(n != size for n in native), LAYOUT_ORDER.index(layout), place)
            if best is None or cost < best[0]:
                best = cost, (size, layout)
    return best[1] if best is not None else None


def _sizes(pages: Iterable[PageSet]) -> Iterator[int]:
    """Page sizes worth trying: the preferred ones, the smallest that all have, and one that all can be divided into."""
    yield from PAGE_ORDER
    smallest = []
    everybody = PageSet()
    for each in pages:
        everybody &= each
        smallest.append(next(iter(each)))
    yield from sorted({*smallest, *_first(everybody)})
    multiple = lcm(*smallest)
    if multiple <= MAX_PAGE_SIZE:
        yield multiple


def _first(pages: PageSet) -> list[int]:
    size = next(iter(pages), None)
    return [] if size is None else [size]


def describe(choice: Choice) -> str:
    """The caches that a choice can use, for people."""
    sides = "; ".join(f"{layout} pages of {pages}" for layout, pages in choice.decision.caches)
    return f"{choice.ref.listed} has {sides}"
