"""What a clause can say about chips, head widths and pages: small values that answer `allows`, and print themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from attn_core.planning.config import MAX_PAGE_SIZE

_ARCH_BOUND: Final = re.compile(r"(>=|<=|>|<|==)?\s*([A-Za-z][A-Za-z0-9_]*)")
_SM: Final = re.compile(r"sm_(\d+)[a-z]?")


def normal_arch(arch: str) -> str:
    """The chip an architecture is for: ``sm_90a`` is sm_90 (the letter is the compiler's), ``gfx942:xnack-`` gfx942."""
    name = arch.strip().lower().partition(":")[0]
    match = _SM.fullmatch(name)
    return f"sm_{match[1]}" if match else name


@dataclass(frozen=True, slots=True)
class ArchSpec:
    """Which architectures: alternatives, each a list of bounds that must all hold. No alternatives allow every chip.

    ``sm_N`` compares as a number. Other names (gfx942, ascend910b) have no order: they are equal or not, but a
    chip may be a bin of the family named (ascend910b3 is an ascend910b).
    """

    text: str
    alternatives: tuple[tuple[tuple[str, str], ...], ...] = ()

    @classmethod
    def parse(cls, value: object) -> ArchSpec:
        """From ``">=sm_80"``, ``">=sm_80,<sm_100"`` (all must hold) or a list (one is enough). Raises ValueError."""
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
            raise ValueError("an architecture such as '>=sm_80', '>=sm_80,<sm_100' or ['gfx942', 'gfx950']")
        alternatives = tuple(tuple(map(_arch_bound, item.split(","))) for item in items)
        single = [bounds[0][0] for bounds in alternatives if len(bounds) == 1]
        if any(op.startswith(">") for op in single) and any(op.startswith("<") for op in single):
            raise ValueError(
                "a list is a choice, so these bounds allow every chip; write both in one text: '>=sm_80,<sm_100'"
            )
        return cls(text=" or ".join(items), alternatives=alternatives)

    def allows(self, arch: str | None) -> bool:
        """Whether a chip of ``arch`` is meant; an unknown chip (None) is only where every chip is."""
        if not self.alternatives:
            return True
        if arch is None:
            return False
        chip = normal_arch(arch)
        return any(all(_arch_holds(chip, op, name) for op, name in bounds) for bounds in self.alternatives)

    def __str__(self) -> str:
        return self.text


def _arch_bound(text: str) -> tuple[str, str]:
    match = _ARCH_BOUND.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text.strip()!r} is not an architecture such as '>=sm_80' or 'gfx942'")
    operator, name = match[1] or "==", normal_arch(match[2])
    if operator != "==" and not _SM.fullmatch(name):
        raise ValueError(f"{text.strip()!r}: only sm_ numbers have an order; list the names instead")
    return operator, name


def _arch_holds(chip: str, operator: str, name: str) -> bool:
    if operator == "==":
        return chip == name or (not name.startswith("sm_") and re.fullmatch(re.escape(name) + r"\d+", chip) is not None)
    have, want = _SM.fullmatch(chip), _SM.fullmatch(name)
    if have is None or want is None:
        return False
    a, b = int(have[1]), int(want[1])
    return {">=": a >= b, "<=": a <= b, ">": a > b, "<": a < b}[operator]


#: Every chip.
ANY_ARCH: Final = ArchSpec("any")


@dataclass(frozen=True, slots=True)
class Widths:
    """Integers from ``min`` to ``max`` that are a multiple of ``multiple_of``."""

    min: int = 1
    max: int | None = None
    multiple_of: int = 1

    def allows(self, n: int) -> bool:
        return n >= self.min and (self.max is None or n <= self.max) and n % self.multiple_of == 0

    def __str__(self) -> str:
        if self.max is not None and self.min == self.max:
            return str(self.min)
        span = f"{self.min}..{self.max}" if self.max is not None else f"from {self.min}"
        return span if self.multiple_of == 1 else f"{span} by {self.multiple_of}"


@dataclass(frozen=True, slots=True)
class HeadDims:
    """Which (qk, v) head widths: pairs of widths; ``same`` asks that v is as wide as qk. None allow every width."""

    entries: tuple[tuple[Widths, Widths, bool], ...] = ()

    def allows(self, qk: int, v: int) -> bool:
        return not self.entries or any(
            a.allows(qk) and b.allows(v) and (not same or qk == v) for a, b, same in self.entries
        )

    @property
    def any_square(self) -> bool:
        """Whether some width is taken for keys and values alike, as encoders have it."""
        return not self.entries or any(
            same or any(a.allows(n) and b.allows(n) for n in range(1, 1025)) for a, b, same in self.entries
        )

    def __str__(self) -> str:
        if not self.entries:
            return "any"
        return ", ".join(f"{a} (qk = v)" if same and a.min != a.max else f"{a}/{b}" for a, b, same in self.entries)


@dataclass(frozen=True, slots=True, order=True)
class PageRule:
    """Page sizes from ``min`` to ``max`` that are a multiple of ``multiple_of``, or the powers of two among them."""

    min: int = 1
    max: int = MAX_PAGE_SIZE
    multiple_of: int = 1
    power_of_two: bool = False

    def allows(self, n: int) -> bool:
        return (
            self.min <= n <= self.max
            and n % self.multiple_of == 0
            and (not self.power_of_two or (n > 0 and n & (n - 1) == 0))
        )

    def __str__(self) -> str:
        if self.min == self.max:
            return str(self.min)
        text = "powers of two" if self.power_of_two else "any"
        if self.multiple_of > 1:
            text = (
                f"multiples of {self.multiple_of}"
                if not self.power_of_two
                else f"{text}, multiples of {self.multiple_of}"
            )
        bounds = [f"from {self.min}"] if self.min > max(1, self.multiple_of) else []
        bounds += [f"up to {self.max}"] if self.max < MAX_PAGE_SIZE else []
        return " ".join([text, *bounds])


@dataclass(frozen=True, slots=True)
class PageSet:
    """Which page sizes, in tokens: every group must allow one (a group is a choice of rules). No groups allow all.

    An intersection keeps the groups of both, so nothing has to be listed: ``{ multiple_of = 16 }`` stays exact.
    """

    groups: tuple[tuple[PageRule, ...], ...] = ()

    @classmethod
    def of(cls, *sizes: int) -> PageSet:
        """Just these sizes."""
        return cls((tuple(PageRule(min=n, max=n) for n in sizes),))

    def allows(self, n: int) -> bool:
        """Whether pages of ``n`` tokens are in the set."""
        return 1 <= n <= MAX_PAGE_SIZE and all(any(rule.allows(n) for rule in group) for group in self.groups)

    def __and__(self, other: PageSet) -> PageSet:
        return PageSet(tuple(dict.fromkeys(self.groups + other.groups)))

    def __or__(self, other: PageSet) -> PageSet:
        if not self.groups or not other.groups:
            return PageSet()
        return PageSet(tuple(dict.fromkeys(tuple(dict.fromkeys(a + b)) for a in self.groups for b in other.groups)))

    def __bool__(self) -> bool:
        """Whether any page size is in the set."""
        return next(iter(self), None) is not None

    def __iter__(self) -> Iterator[int]:
        """Every page size of the set, ascending."""
        exact = [group for group in self.groups if all(rule.min == rule.max for rule in group)]
        candidates: Iterable[int] = sorted({r.min for r in exact[0]}) if exact else range(1, MAX_PAGE_SIZE + 1)
        return (n for n in candidates if self.allows(n))

    def largest_divisor(self, n: int) -> int | None:
        """The largest page size of the set that divides ``n``: ``n`` itself where it is in the set."""
        return next((n // parts for parts in range(1, n + 1) if n % parts == 0 and self.allows(n // parts)), None)

    def __str__(self) -> str:
        if not self.groups:
            return "any"
        if len(self.groups) > 1 and any(all(rule.min == rule.max for rule in group) for group in self.groups):
            return ", ".join(map(str, self)) or "none"
        return " and ".join(", ".join(map(str, group)) or "none" for group in self.groups)


#: No page size at all: what has no cache.
NO_PAGES: Final = PageSet.of()
