"""StaticBatch: a ForwardBatch whose tensors stay where they are, filled from other batches and padded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from attn_core.errors import BatchError, CapacityError, ConfigError
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask

_MODES: Final = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND)


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What every captured step has in common; lengths are the largest of one step, in tokens.

    ``query_len`` new tokens a request. ``tree``: verify with tree masks. ``max_encoder_seq_len`` 0: no cross layers.
    """

    mode: ForwardMode
    max_seq_len: int
    query_len: int = 1
    tree: bool = False
    max_encoder_seq_len: int = 0

    def __post_init__(self) -> None:
        if self.mode not in _MODES or self.query_len < 1 or (self.mode is ForwardMode.DECODE and self.query_len != 1):
            raise ConfigError(
                f"graphs of {self.mode.name} with {self.query_len} new tokens a request",
                accepted="DECODE with 1; TARGET_VERIFY or DRAFT_EXTEND with a fixed number from 1",
            )
        if self.tree and self.mode is not ForwardMode.TARGET_VERIFY:
            raise ConfigError(f"a tree in graphs of {self.mode.name}", accepted="TARGET_VERIFY")
        if self.max_seq_len < 1:
            raise ConfigError(f"graphs of sequences of {self.max_seq_len} tokens", accepted="at least 1")

    def check(self, batch: ForwardBatch) -> None:
        """Raise BatchError for a batch of another form, CapacityError for sequences that are too long."""
        encoder = batch.encoder_seq_lens is not None
        wrong = [
            (batch.mode is not self.mode, f"mode {batch.mode.name}, captured {self.mode.name}"),
            (
                batch.num_tokens != batch.batch_size * self.query_len,
                f"{batch.num_tokens} tokens for {batch.batch_size} requests, captured {self.query_len} for each",
            ),
            ((batch.tree is not None) != self.tree, f"{'a' if batch.tree else 'no'} tree"),
            (encoder != bool(self.max_encoder_seq_len), f"{'an' if encoder else 'no'} encoder"),
            (batch.spans is not None, "spans"),
            (batch.encoder_slot_mapping is not None, "encoder tokens to write"),
        ]
        for holds, problem in wrong:
            if holds:
                raise BatchError(f"a replay with {problem}", accepted="a batch of the form that was captured")
        lengths = (batch.max_seq_len, self.max_seq_len), (batch.max_encoder_seq_len, self.max_encoder_seq_len)
        for given, most in lengths:
            if given > most:
                raise CapacityError(
                    f"a sequence of {given} tokens in a replay", given=given, accepted=f"at most {most}, as captured"
                )


class StaticBatch:
    """Buffers for up to ``max_batch_size`` requests; ``of_size`` gives them as batches, padding until filled.

    A padded request has ``fill_value`` valid tokens, null pages, slots of -1, and tokens that see themselves in a tree.
    """

    def __init__(
        self, shape: GraphShape, max_batch_size: int, *, page_size: int, fill_value: int, device: torch.device
    ) -> None:
        self.shape = shape
        self.fill_value = fill_value
        tokens = max_batch_size * shape.query_len
        starts = torch.arange(0, tokens + 1, shape.query_len, dtype=torch.int32)
        lens = torch.full((max_batch_size,), fill_value, dtype=torch.int32)
        self._alone = torch.eye(shape.query_len, dtype=torch.bool, device=device)
        encoder = shape.max_encoder_seq_len
        self._whole = ForwardBatch(
            mode=shape.mode,
            seq_lens=lens.to(device, copy=True),
            query_start_loc=starts.to(device),
            page_table=_null_pages(max_batch_size, shape.max_seq_len, page_size, device),
            slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=device),
            max_query_len=shape.query_len,
            max_seq_len=shape.max_seq_len,
            seq_lens_cpu=lens,
            query_start_loc_cpu=starts,
            tree=TreeMask(self._alone.repeat(max_batch_size, 1, 1)) if shape.tree else None,
            encoder_seq_lens=torch.zeros(max_batch_size, dtype=torch.int32, device=device) if encoder else None,
            encoder_page_table=_null_pages(max_batch_size, encoder, page_size, device) if encoder else None,
            encoder_seq_lens_cpu=torch.zeros(max_batch_size, dtype=torch.int32) if encoder else None,
            max_encoder_seq_len=encoder,
        )

    def of_size(self, size: int) -> ForwardBatch:
        """The first ``size`` requests of the buffers, as a batch of views."""
        whole = self._whole
        return replace(
            whole,
            seq_lens=whole.seq_lens[:size],
            query_start_loc=whole.query_start_loc[: size + 1],
            page_table=whole.page_table[:size],
            slot_mapping=whole.slot_mapping[: size * self.shape.query_len],
            seq_lens_cpu=_cut(whole.seq_lens_cpu, size),
            query_start_loc_cpu=_cut(whole.query_start_loc_cpu, size + 1),
            tree=None if whole.tree is None else TreeMask(whole.tree.visible[:size]),
            encoder_seq_lens=_cut(whole.encoder_seq_lens, size),
            encoder_page_table=_cut(whole.encoder_page_table, size),
            encoder_seq_lens_cpu=_cut(whole.encoder_seq_lens_cpu, size),
        )

    def fill(self, captured: ForwardBatch, batch: ForwardBatch) -> None:
        """Copy ``batch`` into the buffers behind ``captured``, padding into the rest; the device allocates nothing.

        A batch without host copies of its lengths leaves ``captured`` without them too.
        """
        size, n = captured.batch_size, batch.batch_size
        captured.max_seq_len = max(batch.max_seq_len, self.fill_value)
        captured.max_encoder_seq_len = batch.max_encoder_seq_len
        _fill(captured.seq_lens, batch.seq_lens, self.fill_value)
        _fill(captured.slot_mapping, batch.slot_mapping, -1)
        _fill_table(captured.page_table, batch.page_table)
        captured.seq_lens_cpu = self._host(self._whole.seq_lens_cpu, batch.seq_lens_cpu, size, self.fill_value)
        if captured.tree is not None and batch.tree is not None:
            captured.tree.visible[:n].copy_(batch.tree.visible)
            captured.tree.visible[n:].copy_(self._alone)
        if captured.encoder_seq_lens is not None and batch.encoder_seq_lens is not None:
            _fill(captured.encoder_seq_lens, batch.encoder_seq_lens, 0)
            captured.encoder_seq_lens_cpu = self._host(
                self._whole.encoder_seq_lens_cpu, batch.encoder_seq_lens_cpu, size, 0
            )
        if captured.encoder_page_table is not None and batch.encoder_page_table is not None:
            _fill_table(captured.encoder_page_table, batch.encoder_page_table)

    @staticmethod
    def _host(buffer: Tensor | None, values: Tensor | None, size: int, padding: int) -> Tensor | None:
        if buffer is None or values is None:
            return None
        _fill(buffer[:size], values, padding)
        return buffer[:size]


def _cut(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else tensor[:count]


def _null_pages(requests: int, tokens: int, page_size: int, device: torch.device) -> Tensor:
    return torch.zeros(requests, -(-tokens // page_size), dtype=torch.int32, device=device)


def _fill(buffer: Tensor, values: Tensor, padding: int) -> None:
    count = values.shape[0]
    buffer[:count].copy_(values)
    buffer[count:].fill_(padding)


def _fill_table(buffer: Tensor, table: Tensor) -> None:
    """Page ids into ``buffer`` [n, m]: columns that only one of the two has hold nothing that a request needs."""
    requests, columns = table.shape[0], min(table.shape[1], buffer.shape[1])
    buffer[:requests, :columns].copy_(table[:, :columns])
    buffer[requests:].zero_()
