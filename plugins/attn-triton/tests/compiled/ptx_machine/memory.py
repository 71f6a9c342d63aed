"""Memory of the machine: tensors that a kernel was given and the block's shared memory, every access inside of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptx_machine.races import Races

#: Where a block's shared memory begins: the system holds the first bytes.
SHARED_BASE = 1024


class MemoryAccessError(Exception):
    """An access outside of what there is, or one that is not aligned."""


class Segment:
    """Bytes from ``base`` on."""

    def __init__(self, base: int, data: NDArray[np.uint8], name: str) -> None:
        self.base, self.data, self.name = base, data, name
        self._views: dict[int, NDArray[Any]] = {1: data}

    @property
    def end(self) -> int:
        return self.base + self.data.nbytes

    def check(self, addresses: NDArray[np.int64], width: int) -> None:
        """Raises MemoryAccessError for accesses of ``width`` bytes that are not aligned, or not inside."""
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        if low < self.base or high + width > self.end:
            at = low if low < self.base else high
            raise MemoryAccessError(f"{width} bytes at {at:#x} of {self.name} from {self.base:#x} to {self.end:#x}")
        if (addresses % width).any():
            raise MemoryAccessError(f"{width} bytes at {high:#x} of {self.name}: not aligned")

    def places(self, addresses: NDArray[np.int64], width: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The data as unsigned numbers of ``width`` bytes, and the positions of ``addresses`` in it. Raises
        MemoryAccessError.
        """
        self.check(addresses, width)
        view = self._views.get(width)
        if view is None:
            whole = self.data.nbytes // width * width
            view = self._views[width] = self.data[:whole].view(f"u{width}")
        return view, (addresses - self.base) // width


class GlobalMemory:
    """The storages of tensors, at the addresses they have here."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.untyped_storage().nbytes()
        }
        self.segments = [
            Segment(base, np.asarray(torch.tensor([], dtype=torch.uint8).set_(storage).numpy()), "global memory")
            for base, storage in sorted(storages.items())
        ]
        self._bases = np.array([s.base for s in self.segments], np.int64)

    def load(self, addresses: NDArray[np.int64], width: int) -> NDArray[Any]:
        """Unsigned numbers of ``width`` bytes. Raises MemoryAccessError."""
        found = np.empty(addresses.shape, f"u{width}")
        for mine, segment in self._parted(addresses):
            view, places = segment.places(addresses[mine], width)
            found[mine] = view[places]
        return found

    def store(self, addresses: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Raises MemoryAccessError."""
        for mine, segment in self._parted(addresses):
            view, places = segment.places(addresses[mine], values.dtype.itemsize)
            view[places] = values[mine]

    def _parted(self, addresses: NDArray[np.int64]) -> Iterable[tuple[Any, Segment]]:
        if not addresses.size:
            return
        which = np.searchsorted(self._bases, addresses, "right") - 1
        for i in np.unique(which):
            if i < 0:
                raise MemoryAccessError(f"global memory at {int(addresses.min()):#x}, before every tensor")
            yield (slice(None) if (which == i).all() else which == i), self.segments[i]


class SharedMemory(Segment):
    """The bytes that a block asked for, filled with NaN: nothing may rely on what it finds."""

    def __init__(self, size: int, races: Races | None = None) -> None:
        super().__init__(SHARED_BASE, np.full(size, 0xFF, np.uint8), "shared memory")
        self.races = races

    def load(self, addresses: NDArray[np.int64], width: int, *warps: NDArray[np.intp]) -> NDArray[Any]:
        """Unsigned numbers of ``width`` bytes, which every one of ``warps`` (a warp for each address) reads."""
        view, places = self.places(addresses, width)
        for each in warps if self.races is not None else ():
            assert self.races is not None
            self.races.read(addresses.ravel(), width, np.broadcast_to(each, addresses.shape).ravel())
        return view[places]

    def store(
        self,
        addresses: NDArray[np.int64],
        values: NDArray[Any],
        warps: NDArray[np.intp] | None = None,
        *,
        copied: bool = False,
    ) -> None:
        """``warps``: which one writes to each address; none where somebody else looks after that. ``copied``: by
        cp.async, which Triton's compiler fences nowhere.
        """
        view, places = self.places(addresses, values.dtype.itemsize)
        if self.races is not None and warps is not None:
            changes = np.broadcast_to(view[places] != values, addresses.shape).ravel()
            self.races.write(
                addresses.ravel(), values.dtype.itemsize, np.broadcast_to(warps, addresses.shape).ravel(), changes,
                stored=not copied,
            )  # fmt: skip
        view[places] = values
