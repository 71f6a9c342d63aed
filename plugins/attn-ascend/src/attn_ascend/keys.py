"""Where a call finds its keys: pages of the cache, or tensors that are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from attn_ascend.step import Lengths, Run


class Keys(Protocol):
    """Keys and values of the requests of a step, as either layout of the fused operator wants them."""

    def tokens(self, lengths: Lengths) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(key, value, arguments) for all requests at once, layout TND."""

    def rows(self, run: Run, lengths: Lengths) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(key, value, arguments) for the requests of ``run``, layout BSND."""

    def runs(self, lengths: Lengths) -> list[Run]:
        """The requests that may share a call in layout BSND."""


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """key, value [pages, page_size, heads * width], page table [B, pages] int32; lengths are those of each request."""

    key: Tensor
    value: Tensor
    table: Tensor
    page_size: int

    def tokens(self, lengths: Lengths) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return self.key, self.value, self._arguments(self.table, lengths.keys)

    def rows(self, run: Run, lengths: Lengths) -> tuple[Tensor, Tensor, dict[str, Any]]:
        table = self.table[run.first : run.last]
        return self.key, self.value, self._arguments(table, lengths.keys[run.first : run.last])

    def runs(self, lengths: Lengths) -> list[Run]:
        return lengths.runs()

    def _arguments(self, table: Tensor, keys: list[int]) -> dict[str, Any]:
        return {"block_table": table, "block_size": self.page_size, "actual_seq_kvlen": keys}


@dataclass(frozen=True, slots=True)
class GivenKeys:
    """key [S, heads, width], value [S, heads, v width], contiguous: lengths add up over the requests."""

    key: Tensor
    value: Tensor

    def tokens(self, lengths: Lengths) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return self.key, self.value, {"actual_seq_kvlen": lengths.key_ends}

    def rows(self, run: Run, lengths: Lengths) -> tuple[Tensor, Tensor, dict[str, Any]]:
        end = lengths.key_ends[run.first]
        own = slice(end - lengths.keys[run.first], end)
        return self.key[own].unsqueeze(0), self.value[own].unsqueeze(0), {}

    def runs(self, lengths: Lengths) -> list[Run]:
        """One request each: their numbers of keys differ, and the layout is a rectangle."""
        return [
            Run(request, request + 1, run.queries, run.row + (request - run.first) * run.queries)
            for run in lengths.runs()
            for request in range(run.first, run.last)
            if lengths.keys[request]
        ]
