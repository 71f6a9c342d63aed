"""A page table as FlashInfer wants it: row starts, flat page indices and last-page lengths (CSR), from host lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from attn_core.errors import BatchError
from torch import Tensor


@dataclass(slots=True, eq=False)
class PageIndices:
    """Pages of B requests. On the host, int32: lens [B] tokens, indptr [B + 1] pages before each request,
    last_page_len [B] tokens in the last page (0 for an empty request). On the device: indices [pages] int32.
    """

    lens: Tensor
    indptr: Tensor
    last_page_len: Tensor
    indices: Tensor

    @classmethod
    def of(cls, lens: Tensor | None, page_table: Tensor, page_size: int) -> PageIndices:
        """From host lengths [B] and the page table [B, max_pages] on its device; nothing is read back.

        Raises BatchError if the batch does not carry its lengths on the host.
        """
        lens = on_host(lens, "seq_lens_cpu")
        indptr, last_page_len = page_counts(lens, page_size)
        indices = torch.empty(int(indptr[-1]), dtype=torch.int32, device=page_table.device)
        starts = indptr.to(page_table.device, non_blocking=True) if page_table.is_cuda else indptr
        expand(page_table, starts, indices, longest=longest_row(indptr))
        return cls(lens, indptr, last_page_len, indices)


def on_host(values: Tensor | None, name: str) -> Tensor:
    """``values``, which must be there: FlashInfer plans on the host. Raises BatchError otherwise."""
    if values is None:
        raise BatchError(
            f"a batch without {name}",
            accepted="batches with seq_lens_cpu and query_start_loc_cpu, as the manifest's host_lengths says",
            hint="FlashInfer plans each step on the host; reading the lengths back would stop the device",
        )
    return values


def page_counts(lens: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(indptr [B + 1], last_page_len [B]) int32 on the host, of sequences of ``lens`` [B] tokens."""
    tokens = lens.numpy()
    pages = -(-tokens // page_size)
    indptr = np.zeros(len(tokens) + 1, dtype=np.int32)
    np.cumsum(pages, out=indptr[1:])
    last = tokens - np.maximum(pages - 1, 0) * page_size
    return torch.from_numpy(indptr), torch.from_numpy(last.astype(np.int32, copy=False))


def longest_row(indptr: Tensor) -> int:
    """The largest number of pages of a request."""
    starts = indptr.numpy()
    return int((starts[1:] - starts[:-1]).max(initial=0))


def expand(page_table: Tensor, indptr: Tensor, indices: Tensor, *, longest: int) -> None:
    """indices[indptr[b] : indptr[b + 1]] become the first pages of row b of ``page_table``: one tiled kernel.

    ``indptr`` [B + 1] int32 lies on the table's device, ``longest`` is the most pages of a request, known on the host.
    """
    if not longest:
        return
    if page_table.is_cuda:
        from attn_flashinfer.kernels.metadata import launch_expand

        launch_expand(page_table, indptr, indices, longest)
        return
    for b in range(page_table.shape[0]):
        first, last = int(indptr[b]), int(indptr[b + 1])
        indices[first:last] = page_table[b, : last - first]
