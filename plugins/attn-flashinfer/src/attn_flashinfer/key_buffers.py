"""The pages of a step where captured graphs read them, refilled by one kernel before every replay."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from attn_core.errors import BatchError
from torch import Tensor

from attn_flashinfer.page_indices import on_host


class _Host(NamedTuple):
    """Host memory of one batch size: pages [B], and their starts [B + 1] as numpy array and as tensor, all int32."""

    pages: np.ndarray[Any, np.dtype[np.int32]]
    starts: np.ndarray[Any, np.dtype[np.int32]]
    after_first: np.ndarray[Any, np.dtype[np.int32]]
    indptr: Tensor


class KeyBuffers:
    """indptr [max_batch + 1], last_page_len [max_batch] and indices [max_batch * max_pages], int32, on the device.

    After a refill ``host_indptr`` [B + 1] and ``host_lens`` [B] are those of the batch, until the next.
    """

    def __init__(self, max_batch_size: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._size = max_batch_size
        self._hosts: dict[int, _Host] = {}
        self._lengths = torch.zeros(2 * max_batch_size + 1, dtype=torch.int32, device=device)
        self._indptrs: dict[int, Tensor] = {}
        self._room = max_batch_size * max_pages
        self.indices = torch.zeros(self._room, dtype=torch.int32, device=device)
        self._kernel: Any = None
        if device.type == "cuda":
            from attn_flashinfer.kernels.metadata import Refill

            self._kernel = Refill(self._lengths, self.last_page_len(max_batch_size), self.indices, page_size)
        self.host_indptr = torch.zeros(1, dtype=torch.int32)
        self.host_lens = torch.zeros(0, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._lengths.nbytes + self.indices.nbytes

    def indptr(self, batch_size: int) -> Tensor:
        """[B + 1] on the device."""
        found = self._indptrs.get(batch_size)
        if found is None:
            found = self._indptrs[batch_size] = self._lengths[: batch_size + 1]
        return found

    def last_page_len(self, batch_size: int) -> Tensor:
        """[B] on the device."""
        return self._lengths[self._size + 1 : self._size + 1 + batch_size]

    def refill(self, host_lens: Tensor | None, lens: Tensor, page_table: Tensor) -> None:
        """From the lengths [B], on the host for the planner and on the device for its kernels, and the page table
        [B, pages]; nothing is copied between the two, and nothing is allocated on the device.
        """
        self.host_lens = on_host(host_lens, "seq_lens_cpu")
        tokens = self.host_lens.numpy()
        host = self._hosts.get(len(tokens)) or self._host(len(tokens))
        np.add(tokens, self._page_size - 1, out=host.pages)
        np.floor_divide(host.pages, self._page_size, out=host.pages)
        np.add.accumulate(host.pages, out=host.after_first)
        if host.starts[-1] > self._room:
            raise BatchError(
                f"{host.starts[-1]} pages in graphs for {self._room}",
                accepted="max_batch_size requests of max_context_len tokens",
                hint="plan with a larger max_context_len",
            )
        self.host_indptr = host.indptr
        longest = int(np.maximum.reduce(host.pages, initial=0))
        if self._kernel is not None:
            self._kernel(lens, page_table, longest)
        else:
            self._fill(lens, page_table)

    def _fill(self, lens: Tensor, page_table: Tensor) -> None:
        """What the kernel does, for devices without one."""
        b = len(lens)
        pages = (lens + (self._page_size - 1)) // self._page_size
        self._lengths[0] = 0
        self._lengths[1 : b + 1] = pages.cumsum(0)
        self.last_page_len(b).copy_(lens - (pages - 1).clamp(min=0) * self._page_size)
        for row, first, count in zip(page_table, self._lengths[:b].tolist(), pages.tolist(), strict=True):
            self.indices[first : first + count] = row[:count]

    def _host(self, batch_size: int) -> _Host:
        starts = np.zeros(batch_size + 1, dtype=np.int32)
        pages = np.zeros(batch_size, dtype=np.int32)
        found = self._hosts[batch_size] = _Host(pages, starts, starts[1:], torch.from_numpy(starts))
        return found
