"""SGLang's ForwardBatch as ours: for a step that runs eagerly, and into the buffers of a captured graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_core.engines.sglang.tables import PageTables
from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.graph_batch import GraphShape, StaticBatch

#: SGLang's modes and ours. Its MIXED has its decodes last: extends of one token, to us.
_MODES = {
    "EXTEND": ForwardMode.EXTEND,
    "MIXED": ForwardMode.EXTEND,
    "DECODE": ForwardMode.DECODE,
    "TARGET_VERIFY": ForwardMode.TARGET_VERIFY,
    "IDLE": ForwardMode.IDLE,
}


def mode_of(given: Any) -> ForwardMode:
    """Our mode for SGLang's. Raises BatchError for one that is not translated."""
    if given.forward_mode.name not in _MODES:
        raise BatchError(
            f"a batch of SGLang's mode {given.forward_mode.name}", given=given.forward_mode.name, accepted=list(_MODES)
        )
    return _MODES[given.forward_mode.name]


class Steps:
    """Makes our batches from SGLang's, for the layers of one KV pool."""

    def __init__(
        self,
        tables: PageTables,
        *,
        max_context_len: int,
        num_draft_tokens: int,
        tree: bool,
        verify_buffer: Tensor | None,
    ) -> None:
        self._tables = tables
        self._max_context_len = max_context_len
        self._drafts = num_draft_tokens
        self._tree = tree
        self._verify_buffer = verify_buffer
        #: query_start_loc of one token a request, on host and device, of the last number of requests
        self._singles: tuple[Tensor, Tensor] | None = None

    def eager(self, given: Any) -> ForwardBatch:
        """The step ``given`` describes. In verify, its seq_lens leave out the draft tokens; ours count them."""
        mode, count = mode_of(given), given.batch_size
        lens, host = given.seq_lens.to(torch.int32), given.seq_lens_cpu
        host = None if host is None else host.to(torch.int32)
        starts_cpu: Tensor | None
        tree = None
        if mode is ForwardMode.TARGET_VERIFY:
            tree = TreeMask(self._visible(given, lens)) if self._tree else None
            lens, host = lens + self._drafts, None if host is None else host + self._drafts
            query_len, starts_cpu = self._drafts, torch.arange(count + 1, dtype=torch.int32) * self._drafts
            starts = starts_cpu.to(lens.device)
        elif mode is ForwardMode.EXTEND:
            starts = _summed(given.extend_seq_lens)
            new = given.extend_seq_lens_cpu
            starts_cpu = None if new is None else _summed(torch.tensor(new))
            query_len = max(new, default=0) if new is not None else given.out_cache_loc.shape[0]
        else:
            query_len, (starts_cpu, starts) = min(1, count), self._single_starts(count, lens.device)
        longest = self._max_context_len if host is None else int(host.max()) if count else 0
        tokens = given.out_cache_loc.shape[0] if starts_cpu is None else int(starts_cpu[-1])
        return ForwardBatch(
            mode=mode,
            seq_lens=lens,
            query_start_loc=starts,
            page_table=self._tables.pages(given.req_pool_indices, longest),
            slot_mapping=self._tables.slots(given.out_cache_loc[:tokens]),
            max_query_len=query_len,
            max_seq_len=longest,
            seq_lens_cpu=host,
            query_start_loc_cpu=starts_cpu,
            tree=tree,
        )

    def _single_starts(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._singles is None or self._singles[0].shape[0] != count + 1 or self._singles[1].device != device:
            starts = torch.arange(count + 1, dtype=torch.int32)
            self._singles = starts, starts.to(device)
        return self._singles

    def buffers(self, mode: ForwardMode, max_batch_size: int, *, fill_value: int, device: torch.device) -> StaticBatch:
        """Buffers for graphs of ``mode`` of up to ``max_batch_size`` requests."""
        verify = mode is ForwardMode.TARGET_VERIFY
        shape = GraphShape(
            mode,
            max_seq_len=self._tables.columns * self._tables.page_size,
            query_len=self._drafts if verify else 1,
            tree=self._tree and verify,
        )
        return StaticBatch(
            shape, max_batch_size, page_size=self._tables.page_size, fill_value=fill_value, device=device
        )

    def fill(self, captured: ForwardBatch, given: Any, *, in_capture: bool) -> None:
        """What ``given`` says into the tensors of ``captured``, with the same number of requests; padded by SGLang.

        Its padded requests are row 0 of its table, which is all null pages, and write to slot 0, in the null page.
        What is captured must hold the longest sequence, not the one that is there at the time.
        """
        count = captured.batch_size
        captured.seq_lens.copy_(given.seq_lens[:count])
        host = given.seq_lens_cpu
        if captured.mode is ForwardMode.TARGET_VERIFY:
            if captured.tree is not None:
                captured.tree.visible.copy_(self._visible(given, captured.seq_lens))
            captured.seq_lens += self._drafts
            host = None if host is None else host + self._drafts
        self._tables.pages_into(captured.page_table, given.req_pool_indices[:count])
        self._tables.slots_into(captured.slot_mapping, given.out_cache_loc[: captured.num_tokens])
        captured.seq_lens_cpu = None if host is None else host[:count].to(torch.int32)
        exact = host is not None and not in_capture
        captured.max_seq_len = int(host[:count].max()) if exact else self._tables.columns * self._tables.page_size

    def _visible(self, given: Any, prefix_lens: Tensor) -> Tensor:
        """[B, q, q] bool from SGLang's mask, which is that, or has a column for each token of the prefix before it."""
        count, q = prefix_lens.shape[0], self._drafts
        mask: Tensor | None = getattr(given.spec_info, "custom_mask", None)
        if mask is None:
            raise BatchError("a verify batch without a mask, where trees are planned")
        ours = self._verify_buffer is not None and mask.data_ptr() == self._verify_buffer.data_ptr()
        if ours or mask.numel() == count * q * q:
            return mask[: count * q * q].view(count, q, q).bool()
        widths = prefix_lens.long() + q
        before = torch.cumsum(q * widths, 0) - q * widths
        rows = before[:, None] + torch.arange(q, device=mask.device) * widths[:, None] + prefix_lens.long()[:, None]
        return mask[rows[:, :, None] + torch.arange(q, device=mask.device)].bool()


def _summed(lens: Tensor) -> Tensor:
    """[B + 1] int32: 0, and the sums so far."""
    return torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
