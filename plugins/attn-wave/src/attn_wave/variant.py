"""What a compiled kernel is of: the facts that are compiled in; everything else is data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: Score of a key that a row does not see: its weight is 0 beside any that is seen, and sums of it are no NaN.
MASKED: Final = -1e6
LOG2_E: Final = 1.4426950408889634
#: Elements that rows of q, k and v begin at multiples of: 16 bytes, the widest load.
UNIT: Final = 8
#: Columns of the work list [W, 10] int32.
WORK_FIELDS: Final = (
    "row_start", "row_count", "query_offset", "key_start", "key_count", "key_offset", "key_base", "out_start",
    "num_drafts", "value_offset",
)  # fmt: skip
DTYPES: Final = ("float16", "bfloat16")
#: Widths of keys and values that kernels are built for, and the rows that a workgroup may take: 16 a wave.
WIDTHS: Final = {
    (64, 64): (16, 64),
    (128, 128): (16, 64),
    (256, 256): (16, 64),
    (192, 128): (16, 64),
    (576, 512): (16,),
}
#: Widths of layers whose keys are only ever given: they have no trees to verify.
GIVEN_ONLY: Final = ((192, 128),)
#: Keys a step of the loop; both tiles of the widest must lie in 64 KiB of LDS.
_KEYS: Final = {(576, 512): 16}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel: widths of a head, dtype, rows a workgroup takes, and what it can do beyond plain attention."""

    qk_width: int
    v_width: int
    dtype: str
    rows: int
    softcap: bool = False
    tree: bool = False

    @property
    def keys(self) -> int:
        """Keys a step of its loop."""
        return _KEYS.get((self.qk_width, self.v_width), 32)

    @property
    def waves(self) -> int:
        """Waves of 64 lanes in a workgroup."""
        return self.rows // 16

    @property
    def key(self) -> str:
        """What its files are called."""
        extras = "".join(f"-{name}" for name in ("softcap", "tree") if getattr(self, name))
        return f"{self.qk_width}x{self.v_width}-{self.dtype}-{self.rows}{extras}"


def all_variants() -> Iterator[Variant]:
    """Every kernel that the manifest's claims rest on."""
    for (qk, v), rows_of in WIDTHS.items():
        for dtype in DTYPES:
            for rows in rows_of:
                for softcap in (False, True):
                    trees = (False, True) if rows == 16 and (qk, v) not in GIVEN_ONLY else (False,)
                    for tree in trees:
                        yield Variant(qk, v, dtype, rows, softcap, tree)
