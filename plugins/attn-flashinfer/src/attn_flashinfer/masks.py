"""Masks as FlashInfer wants them: for each request the bits of a [queries, keys] matrix, packed, least bit first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from attn_core.runtime.batch import ForwardBatch
from torch import Tensor

#: The kernels read a mask in words: bytes after the last one must be there.
SLACK = 16


@dataclass(slots=True, eq=False)
class MaskPlan:
    """Where each request's bits lie: byte_starts [B + 1] int32 on the host, in bytes, not in bits as
    ``plan(packed_custom_mask=)`` computes them."""

    byte_starts: Tensor

    @classmethod
    def of(cls, query_lens: np.ndarray, key_lens: np.ndarray) -> MaskPlan:
        """For requests of these lengths [B]."""
        starts = np.zeros(len(key_lens) + 1, dtype=np.int64)
        np.cumsum((query_lens.astype(np.int64) * key_lens + 7) // 8, out=starts[1:])
        return cls(torch.from_numpy(starts.astype(np.int32)))

    @property
    def num_bytes(self) -> int:
        """Bytes of all masks, with what must follow them."""
        return int(self.byte_starts[-1]) + SLACK

    @property
    def longest(self) -> int:
        """Bytes of the longest mask."""
        starts = self.byte_starts.numpy()
        return int((starts[1:] - starts[:-1]).max(initial=0))


def pack(
    batch: ForwardBatch,
    window: int | None,
    byte_starts: Tensor,
    packed: Tensor,
    *,
    longest: int,
    depths: Tensor | None = None,
) -> None:
    """Fill ``packed`` uint8 with what each query of ``batch`` sees: its tree, its spans, the window by position.

    ``byte_starts`` [B + 1] int32 lies on the batch's device. Bit i * m + j of a request of m keys says whether its
    query i sees its key j; keys are in cache order. ``depths`` is room for one int32 a draft, for replays, which must
    not allocate.
    """
    if batch.device.type == "cuda":
        from attn_flashinfer.kernels.metadata import launch_pack

        launch_pack(batch, window, byte_starts, packed, longest, depths)
        return
    for b in range(batch.batch_size):
        bits = visible_keys(batch, b, window).flatten()
        padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8)
        padded[: bits.numel()] = bits
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        first = int(byte_starts[b])
        packed[first : first + padded.numel() // 8] = (padded.view(-1, 8) * weights).sum(-1).to(torch.uint8)


def visible_keys(batch: ForwardBatch, b: int, window: int | None) -> Tensor:
    """[n, m] bool: what the n queries of request b see of its m keys; the definition that the kernel computes."""
    n = int(batch.query_start_loc[b + 1] - batch.query_start_loc[b])
    m = int(batch.seq_lens[b])
    key = torch.arange(m)
    prefix = m - n
    query = torch.arange(prefix, m)
    seen = key[None, :] <= query[:, None]
    if batch.tree is not None and prefix >= 0:
        depth = batch.tree.visible[b].sum(-1) - 1
        query = prefix + depth
        key = torch.cat([key[:prefix], query])
        seen = torch.cat([torch.ones(n, prefix, dtype=torch.bool), batch.tree.visible[b]], dim=1)
    if batch.spans is not None:
        for start, stop in batch.spans[b].tolist():
            seen = seen | (inside(query, start, stop)[:, None] & inside(key, start, stop)[None, :])
    return seen if window is None else seen & (key[None, :] > query[:, None] - window)


def inside(position: Tensor, start: int, stop: int) -> Tensor:
    """Which positions lie in the half-open span."""
    return (position >= start) & (position < stop)
