"""GraphBuffers: the tensors that captured graphs of torch_native read, made once and refreshed before each replay."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_core.errors import BatchError, CapacityError
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.torch_native.padded import PaddedStep


class GraphBuffers:
    """Steps of fixed shapes, by mode and batch size, over buffers that they share.

    A captured step is as wide as its batch's page table; ``capture`` raises CapacityError beyond the bounds given here,
    ``replay`` for a sequence that is longer than what was captured.
    """

    def __init__(self, max_batch_size: int, max_num_tokens: int, max_columns: int, device: torch.device) -> None:
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.max_columns = max_columns
        self._device = device
        self._seq_lens = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self._page_table = torch.zeros(max_batch_size, max_columns, dtype=torch.int32, device=device)
        self._slot_mapping = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        self._optional: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._steps: dict[tuple[ForwardMode, int], PaddedStep] = {}

    def capture(self, batch: ForwardBatch, page_size: int) -> PaddedStep:
        """The step of this mode and batch size, over the shared buffers, which now hold ``batch``."""
        requests, tokens = batch.batch_size, batch.num_tokens
        if requests > self.max_batch_size or tokens > self.max_num_tokens:
            raise CapacityError(
                f"{requests} requests and {tokens} tokens to capture",
                accepted=f"at most {self.max_batch_size} and {self.max_num_tokens}, of init_cuda_graph_state",
            )
        query_len, rest = divmod(tokens, max(1, requests))
        if rest or (batch.mode is ForwardMode.DECODE and query_len != 1):
            raise BatchError(f"{tokens} tokens for {requests} requests to capture", accepted="as many for each of them")
        own = PaddedStep.of(batch, query_len, page_size)
        step = PaddedStep(
            query_len=query_len,
            slot_mapping=self._slot_mapping[:tokens],
            seq_lens=self._seq_lens[:requests],
            page_table=self._page_table[:requests, : own.page_table.shape[1]],
            tree=self._like("tree", own.tree),
            spans=self._like("spans", own.spans),
            encoder_seq_lens=self._like("encoder_seq_lens", own.encoder_seq_lens),
            encoder_page_table=self._like("encoder_page_table", own.encoder_page_table),
        )
        self._steps[batch.mode, requests] = step
        _refresh(step, own)
        return step

    def replay(self, batch: ForwardBatch, page_size: int) -> PaddedStep:
        """The captured step of this mode and batch size, filled from ``batch`` by copies on the device only."""
        step = self._steps.get((batch.mode, batch.batch_size))
        if step is None:
            raise BatchError(
                f"no graph of {batch.batch_size} requests in mode {batch.mode.name}",
                accepted=[f"{mode.name} {size}" for mode, size in self._steps],
            )
        held = step.page_table.shape[1] * page_size
        if batch.max_seq_len > held:
            raise CapacityError(f"a sequence of {batch.max_seq_len} tokens", accepted=f"{held}, as captured")
        _refresh(step, PaddedStep.of(batch, step.query_len, page_size))
        return step

    def _like(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A buffer of the shape of ``tensor``, one for all captures that need this shape."""
        if tensor is None:
            return None
        key = name, tuple(tensor.shape)
        if key not in self._optional:
            self._optional[key] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        return self._optional[key]


def _refresh(step: PaddedStep, new: PaddedStep) -> None:
    """Copy ``new`` into the buffers of ``step``. Raises BatchError where one has what the other has not."""
    step.slot_mapping.copy_(new.slot_mapping)
    step.seq_lens.copy_(new.seq_lens)
    _copy_columns(step.page_table, new.page_table)
    for name in ("tree", "spans", "encoder_seq_lens", "encoder_page_table"):
        buffer, value = getattr(step, name), getattr(new, name)
        if (buffer is None) != (value is None):
            raise BatchError(
                f"a batch {'with' if buffer is None else 'without'} {name}", accepted="what the graph was captured with"
            )
        if name == "encoder_page_table" and buffer is not None:
            _copy_columns(buffer, value)
        elif buffer is not None:
            buffer.copy_(value)


def _copy_columns(buffer: Tensor, table: Tensor) -> None:
    """The page ids that ``table`` [B, n] has, into ``buffer`` [B, m]: no request needs more columns than it has."""
    columns = min(buffer.shape[1], table.shape[1])
    buffer[:, :columns].copy_(table[:, :columns])
