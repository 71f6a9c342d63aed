"""Pools larger than addresses of 32 bits reach: where pages lie, what is looked at of them, the memory they take.

The pages of a case with ``far`` N begin beyond element 2**N of each of its pools, and beyond element 2**(N + 1) of what
holds a layer's keys and values together. An address that loses what lies above its lowest N or N + 1 bits comes out
before them: in the first pages, which hold other data or no numbers, or among zeros.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import torch
from torch import Tensor

from attn_core.planning.config import LayerKind
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import FP8_DTYPES, cache_dtype
from attn_core.testing.cases import Case

#: Free memory that there must be beside the pools.
_MARGIN: Final = 1 << 30
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Site:
    """Where the ``count`` pages of a placement lie in a pool: from page ``away`` on, or they are all there is (0).

    If they are far away, as many pages at the beginning and one more are watched too: there their addresses wrap to.
    """

    count: int
    away: int
    page_size: int

    @classmethod
    def of(cls, case: Case, count: int) -> Site:
        """The site of a case whose placement has ``count`` pages."""
        return cls(count, _pages_before(case, count), case.page_size)

    @property
    def num_pages(self) -> int:
        """The pages of the pool."""
        return self.away + self.count

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """(first page, count) of what has contents, in their order."""
        return ((self.away, self.count), (0, self.count + 1)) if self.away else ((0, self.count),)

    @property
    def num_slots(self) -> int:
        """The slots of the regions."""
        return sum(count for _, count in self.regions) * self.page_size

    def watched(self, pool: Tensor) -> Tensor:
        """[pages, ...]: the regions of a pool [pages, ...], as a copy if they are not all of it."""
        if not self.away:
            return pool
        bits = pool.view(torch.uint8) if pool.dtype in FP8_DTYPES else pool
        return torch.cat([bits[first : first + count] for first, count in self.regions]).view(pool.dtype)

    def put(self, pool: Tensor, contents: Tensor) -> None:
        """Copy contents [pages, ...] into the regions of a pool of the same dtype."""
        parts = torch.split(contents, [count for _, count in self.regions])
        for (first, count), part in zip(self.regions, parts, strict=True):
            pool[first : first + count].copy_(part)

    def slots(self, slots: Tensor) -> Tensor:
        """The slots of the pool for slots of the placement; -1 stays."""
        return torch.where(slots < 0, slots, slots + self.away * self.page_size) if self.away else slots

    def move(self, batch: ForwardBatch) -> None:
        """Name the pages and the slots of the pool, in a batch that names those of the placement."""
        if not self.away:
            return
        batch.page_table = batch.page_table + self.away
        batch.slot_mapping = self.slots(batch.slot_mapping)
        if batch.encoder_page_table is not None:
            batch.encoder_page_table = batch.encoder_page_table + self.away
        if batch.encoder_slot_mapping is not None:
            batch.encoder_slot_mapping = self.slots(batch.encoder_slot_mapping)


def _pages_before(case: Case, count: int) -> int:
    """How many pages of every pool lie before those of the case; 0 if it is not far."""
    kinds = _cached(case)
    if not case.far or not kinds:
        return 0
    together = max(-(-(2 << case.far) // (case.page_size * sum(_widths(kind)))) for kind in kinds)
    alone = max(-(-(1 << case.far) // (case.page_size * min(_widths(kind)))) for kind in kinds)
    return max(together, alone, count + 1)


def _cached(case: Case) -> list[LayerKind]:
    return [kind for kind in case.kinds if not kind.ragged]


def _widths(kind: LayerKind) -> tuple[int, ...]:
    """The values of a token in each of the pools of a layer."""
    mha = (kind.num_kv_heads * kind.qk_head_dim, kind.num_kv_heads * kind.v_head_dim)
    return (kind.qk_head_dim,) if kind.kind == "mla" else mha


def memory_needed(case: Case) -> int:
    """Bytes that must be free for a case that is far: its pools, and a margin."""
    tokens = _pages_before(case, 0) * case.page_size
    stored = (_widths(kind) for kind in _cached(case))
    widths = (len(pools) * max(pools) if "stacked" in case.options else sum(pools) for pools in stored)
    return tokens * sum(widths) * cache_dtype(case.config()).itemsize + _MARGIN


def memory_free(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where nobody says."""
    if device.type != "cpu":
        library = torch.get_device_module(device.type)
        return int(library.mem_get_info()[0]) if hasattr(library, "mem_get_info") else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else None


@contextmanager
def room_for(case: Case, device: torch.device) -> Iterator[str]:
    """Has the device's memory for this case alone, of all that are far; gives what is lacking, "" if nothing is.

    Processes of one user that run such cases side by side on one machine take turns.
    """
    with _turn(device):
        if device.type != "cpu":
            _let_go(device)
        needed, free = memory_needed(case), memory_free(device)
        if free is not None and free >= needed:
            yield ""
        else:
            has = "nobody says how much it has" if free is None else f"{free // _GIB} GiB are"
            yield f"{-(-needed // _GIB)} GiB must be free on {device.type}, and {has}"
        _let_go(device)


def _let_go(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device.type).empty_cache()


@contextmanager
def _turn(device: torch.device) -> Iterator[None]:
    """One process after the other; where the system has no such locks, all at once."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    name = f"attn-far-{device.type}-{os.getuid()}.lock"
    stream: IO[str]
    with open(os.path.join(tempfile.gettempdir(), name), "w", encoding="ascii") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
        yield
