"""The pages of a step where captured graphs read them, refilled by one copy and one kernel before every replay."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from attn_core.errors import BatchError
from torch import Tensor

from attn_flashinfer.page_indices import expand, on_host
from attn_flashinfer.wrappers import Staging


class _Lengths(NamedTuple):
    """Views of one piece of page-locked memory: indptr [B + 1], last_page_len [B], and the same as numpy arrays."""

    indptr: Tensor
    last_page_len: Tensor
    starts: np.ndarray[Any, np.dtype[np.int32]]
    last: np.ndarray[Any, np.dtype[np.int32]]


class KeyBuffers:
    """indptr [max_batch + 1], last_page_len [max_batch] and indices [max_batch * max_pages], int32, on the device.

    After a refill ``host_indptr``, ``host_last_page_len`` and ``host_lens`` are those of the batch, until the next.
    """

    def __init__(self, max_batch_size: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._size = max_batch_size
        self._staging = Staging(2 * max_batch_size + 1, torch.int32, device)
        self._views: dict[tuple[int, int], _Lengths] = {}
        self._pages = np.zeros(max_batch_size, dtype=np.int32)
        self._lengths = torch.zeros(2 * max_batch_size + 1, dtype=torch.int32, device=device)
        self._indptrs: dict[int, Tensor] = {}
        self.indices = torch.zeros(max_batch_size * max_pages, dtype=torch.int32, device=device)
        self.host_indptr = torch.zeros(1, dtype=torch.int32)
        self.host_last_page_len = torch.zeros(0, dtype=torch.int32)
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

    def refill(self, lens: Tensor | None, page_table: Tensor) -> None:
        """From host lengths [B] and the page table [B, pages]; no device-to-host copy, no allocation on the device."""
        self.host_lens = on_host(lens, "seq_lens_cpu")
        tokens = self.host_lens.numpy()
        piece = self._staging.take()
        host = self._host(piece, len(tokens))
        pages = self._pages[: len(tokens)]
        np.add(tokens, self._page_size - 1, out=pages)
        np.floor_divide(pages, self._page_size, out=pages)
        longest = int(pages.max(initial=0))
        host.starts[0] = 0
        np.cumsum(pages, out=host.starts[1:])
        np.subtract(pages, 1, out=pages)
        np.maximum(pages, 0, out=pages)
        np.multiply(pages, self._page_size, out=pages)
        np.subtract(tokens, pages, out=host.last)
        count = int(host.starts[-1])
        if count > len(self.indices):
            raise BatchError(
                f"{count} pages in graphs for {len(self.indices)}",
                accepted="max_batch_size requests of max_context_len tokens",
                hint="plan with a larger max_context_len",
            )
        self.host_indptr, self.host_last_page_len = host.indptr, host.last_page_len
        self._lengths.copy_(piece, non_blocking=True)
        self._staging.mark_copied()
        expand(page_table, self.indptr(len(tokens)), self.indices, longest=longest)

    def _host(self, piece: Tensor, batch_size: int) -> _Lengths:
        key = (piece.data_ptr(), batch_size)
        found = self._views.get(key)
        if found is None:
            indptr, last = piece[: batch_size + 1], piece[self._size + 1 : self._size + 1 + batch_size]
            found = self._views[key] = _Lengths(indptr, last, indptr.numpy(), last.numpy())
        return found
