"""Captured steps: buffers that stay where they are, and steps over them whose shapes no length changes.

A replay copies a batch into the buffers. All else, the expanded page table and the work list among it, is made of them
on the device as a part of the graph: a captured step reads no length on the host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from attn_core.errors import BatchError, CapacityError, ConfigError
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from torch import Tensor

from attn_wave.step import Step

#: What a batch may have beside its lengths, pages and slots; captures have buffers of their own for these.
_OPTIONAL: Final = ("spans", "encoder_seq_lens", "encoder_page_table")


class GraphBuffers:
    """What the captured graphs of one backend read, and their steps by mode and size. One graph runs at a time."""

    def __init__(self, max_batch_size: int, max_num_tokens: int, max_columns: int, device: torch.device) -> None:
        """Raises ConfigError for bounds that no step has."""
        if max_batch_size < 1 or max_num_tokens < max_batch_size:
            raise ConfigError(
                f"graphs of {max_batch_size} requests and {max_num_tokens} tokens",
                accepted="at least one of each, a token for each request",
            )
        self._lengths = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self._pages = torch.zeros(max_batch_size, max_columns, dtype=torch.int32, device=device)
        self._slots = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        self._steps: dict[tuple[ForwardMode, int, int], Step] = {}

    def capture(self, batch: ForwardBatch, page_size: int) -> Step:
        """The step of this mode and size, over the buffers, which now hold ``batch``; as wide as its page table.

        Raises CapacityError for a batch beyond the bounds, BatchError for requests of different numbers of tokens.
        """
        requests, tokens, columns = batch.batch_size, batch.num_tokens, batch.page_table.shape[1]
        most = len(self._lengths), len(self._slots), self._pages.shape[1]
        if any(wanted > bound for wanted, bound in zip((requests, tokens, columns), most, strict=True)):
            raise CapacityError(
                f"{requests} requests, {tokens} tokens and {columns} pages a request to capture",
                accepted=f"at most {most[0]}, {most[1]} and {most[2]}",
            )
        each, rest = divmod(tokens, max(1, requests))
        if rest:
            raise BatchError(f"{tokens} tokens for {requests} requests to capture", accepted="as many for each of them")
        if batch.encoder_slot_mapping is not None:
            raise BatchError("encoder tokens to write in a captured graph", accepted="encoders that are in the cache")
        own = replace(
            batch,
            seq_lens=self._lengths[:requests],
            page_table=self._pages[:requests, :columns],
            slot_mapping=self._slots[:tokens],
            tree=None if batch.tree is None else TreeMask(torch.zeros_like(batch.tree.visible)),
            spans=_like(batch.spans),
            encoder_seq_lens=_like(batch.encoder_seq_lens),
            encoder_page_table=_like(batch.encoder_page_table),
            plan_state=None,
        )
        step = Step(own, page_size, each)
        self._steps[batch.mode, requests, tokens] = step
        _fill(own, batch)
        return step

    def replay(self, batch: ForwardBatch) -> Step:
        """The captured step of the form of ``batch``, filled from it by copies. Raises BatchError, CapacityError."""
        step = self._steps.get((batch.mode, batch.batch_size, batch.num_tokens))
        if step is None:
            raise BatchError(
                f"no graph of {batch.batch_size} requests and {batch.num_tokens} tokens in mode {batch.mode.name}",
                accepted=[f"{size} and {tokens} in {mode.name}" for mode, size, tokens in self._steps],
            )
        room = step.batch.page_table.shape[1] * step.page_size
        if batch.max_seq_len > room:
            raise CapacityError(f"a sequence of {batch.max_seq_len} tokens", accepted=f"{room}, as captured")
        _fill(step.batch, batch)
        # what was made outside a graph is of other lengths
        step.made.clear()
        return step


def _fill(own: ForwardBatch, batch: ForwardBatch) -> None:
    """Copy ``batch`` into the buffers. Raises BatchError where one has what the other has not."""
    own.seq_lens.copy_(batch.seq_lens)
    own.slot_mapping.copy_(batch.slot_mapping)
    _copy_columns(own.page_table, batch.page_table)
    for name in _OPTIONAL:
        _copy_optional(name, getattr(own, name), getattr(batch, name))
    _copy_optional(
        "tree", None if own.tree is None else own.tree.visible, None if batch.tree is None else batch.tree.visible
    )


def _copy_optional(name: str, buffer: Tensor | None, given: Tensor | None) -> None:
    if buffer is None and given is None:
        return
    if buffer is None or given is None:
        raise BatchError(
            f"a batch {'with' if buffer is None else 'without'} {name}", accepted="what the graph was captured with"
        )
    if name == "encoder_page_table":
        _copy_columns(buffer, given)
    else:
        buffer.copy_(given)


def _copy_columns(buffer: Tensor, table: Tensor) -> None:
    """The page ids of ``table`` [B, n] into ``buffer`` [B, m]: no request needs more columns than it has."""
    columns = min(buffer.shape[1], table.shape[1])
    buffer[:, :columns].copy_(table[:, :columns])


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor, memory_format=torch.contiguous_format)
