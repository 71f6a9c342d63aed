"""What a compiled kernel is of: the facts that are compiled in; everything else is data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Score of a key that a row does not see: its weight is 0 beside any that is seen, and sums of it are no NaN.
MASKED: Final = -1e6
#: Elements that rows of q, k and v begin at multiples of: 16 bytes, the widest load.
UNIT: Final = 8
LOG2_E: Final = 1.4426950408889634
#: Columns of the work list [W, 10] int32.
WORK_FIELDS: Final = (
    "row_start", "row_count", "query_offset", "key_start", "key_count", "key_offset", "key_base", "out_start",
    "num_drafts", "value_offset",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel: widths of a head, dtype, rows a workgroup takes (16 a wave), keys a tile, and what it can do."""

    qk_width: int
    v_width: int
    dtype: str
    rows: int
    keys: int
    softcap: bool = False
    tree: bool = False

    @property
    def waves(self) -> int:
        return self.rows // 16
