"""What a compiled kernel of the second phase is of, and every kernel there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from attn_wave.variant import DTYPES, WIDTHS, Variant, all_variants

#: Log-sum-exps of base 2 below this are of rows that saw no key: half way to `MASKED`.
SAW_NOTHING: Final = -5e5


@dataclass(frozen=True, slots=True)
class JoinVariant:
    """One kernel that joins runs: the width of its values, and the dtype of what it leaves."""

    width: int
    dtype: str

    @property
    def waves(self) -> int:
        """Waves of 64 lanes in a workgroup: a row each."""
        return 1

    @property
    def key(self) -> str:
        """What its files are called."""
        return f"join-{self.width}-{self.dtype}"


AnyVariant = Variant | JoinVariant


def join_variants() -> Iterator[JoinVariant]:
    """One for each width of values and dtype."""
    for width in dict.fromkeys(v for _, v in WIDTHS):
        for dtype in DTYPES:
            yield JoinVariant(width, dtype)


def all_kernels() -> Iterator[AnyVariant]:
    """Every kernel that the manifest's claims rest on."""
    yield from all_variants()
    yield from join_variants()


def kernel_of(variant: AnyVariant) -> str:
    """The source that it is compiled from: ``attend`` or ``join``."""
    return "join" if isinstance(variant, JoinVariant) else "attend"
