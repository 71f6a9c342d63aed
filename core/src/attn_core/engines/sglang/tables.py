"""From SGLang's table of token slots to tables of pages, on the device: for a step, and into buffers that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PageTables:
    """``req_to_token`` [requests, tokens] int32 holds a slot for every token, page * page_size + offset.

    Pages are what its every page_size-th column says, divided. A window pool has slots of its own: SGLang's mapping
    from the slots in the table to them is looked up on the way; tokens that it has dropped map to page 0.
    """

    def __init__(self, req_to_token: Tensor, page_size: int, pool: Any | None) -> None:
        self.page_size = page_size
        self._first_tokens = req_to_token[:, ::page_size]
        self._pool = pool
        self._scratch: dict[str, Tensor] = {}

    @property
    def columns(self) -> int:
        """Pages of the longest request that the table can hold."""
        return self._first_tokens.shape[1]

    def pages(self, requests: Tensor, max_seq_len: int) -> Tensor:
        """[B, m] int32: the pages of ``requests`` [B], as many as ``max_seq_len`` tokens need."""
        wanted = max(1, -(-max_seq_len // self.page_size))
        slots = self._first_tokens[:, :wanted].index_select(0, requests.long())
        if self._pool is not None:
            slots = self._pool.translate_loc_from_full_to_swa(slots.long())
        if self.page_size == 1:
            return slots.to(torch.int32)
        return torch.div(slots, self.page_size, rounding_mode="floor").to(torch.int32)

    def slots(self, given: Tensor) -> Tensor:
        """[T] int64: where the tokens of SGLang's slots ``given`` [T] lie."""
        if self._pool is not None:
            given = self._pool.translate_loc_from_full_to_swa(given)
        return given.long()

    def pages_into(self, table: Tensor, requests: Tensor) -> None:
        """``pages`` of all columns, into ``table`` [B, columns] int32; allocates the first time only."""
        count = table.shape[0]
        torch.index_select(self._first_tokens, 0, requests, out=table)
        if self._pool is not None:
            slots = self._buffer("slots", table, count * table.shape[1])
            mapped = self._buffer("mapped", table, count * table.shape[1])
            slots.copy_(table.view(-1))
            torch.index_select(self._pool.full_to_swa_index_mapping, 0, slots, out=mapped)
            table.view(-1).copy_(mapped)
        table.floor_divide_(self.page_size)

    def slots_into(self, out: Tensor, given: Tensor) -> None:
        """``slots`` into ``out`` [T] int64; allocates the first time only."""
        if self._pool is None:
            out.copy_(given)
            return
        index = self._buffer("tokens", out, given.shape[0])
        index.copy_(given)
        torch.index_select(self._pool.full_to_swa_index_mapping, 0, index, out=out)

    def _buffer(self, name: str, like: Tensor, count: int) -> Tensor:
        """[count] int64 of the buffer ``name``, which is made by the first, largest capture."""
        if name not in self._scratch or self._scratch[name].shape[0] < count:
            self._scratch[name] = torch.zeros(count, dtype=torch.int64, device=like.device)
        return self._scratch[name][:count]
