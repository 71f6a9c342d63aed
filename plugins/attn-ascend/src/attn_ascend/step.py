"""What one step is to this backend: lengths on the host, page table and slots as the operators want them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Final

import torch
from attn_core.errors import BatchError, CapacityError
from attn_core.runtime.batch import ForwardBatch
from torch import Tensor

if TYPE_CHECKING:
    from attn_ascend.copies import Copies
    from attn_ascend.latent import Expanded, Gathered

#: Requests that one call of the fused operator takes in the TND layout (elements of actual_seq_qlen).
MAX_REQUESTS: Final = 4096
#: Keys of one request: the operator's limit for a single query.
MAX_KEYS: Final = 262144


@dataclass(frozen=True, slots=True)
class Run:
    """Requests ``first``..``last`` - 1, one after the other, with ``queries`` new tokens each, from row ``row`` on."""

    first: int
    last: int
    queries: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + (self.last - self.first) * self.queries)


@dataclass(slots=True)
class Lengths:
    """Queries and keys of each request, on the host, where the fused operator wants them."""

    queries: list[int]
    keys: list[int]

    @property
    def query_ends(self) -> list[int]:
        """Where each request's queries end, counted from the first request: the TND form."""
        return list(accumulate(self.queries))

    @property
    def key_ends(self) -> list[int]:
        return list(accumulate(self.keys))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.queries, self.keys, strict=True))

    def runs(self) -> list[Run]:
        """Requests of one query length that follow each other; those without a query are left out."""
        found, request, row = [], 0, 0
        for queries, group in groupby(self.queries):
            count = len(list(group))
            if queries:
                found.append(Run(request, request + count, queries, row))
            request, row = request + count, row + count * queries
        return found


@dataclass(slots=True)
class Step:
    """``plan_state`` of a batch: table [B, pages] int32 and slots [T] int32, contiguous; a captured step keeps them.

    ``graph`` names the captured graph that this step belongs to, None in eager steps. ``expanded``, ``gathered``
    (by the first request of a run) and ``copies`` are what the first layer that needs them adds for those after it.
    """

    lengths: Lengths
    table: Tensor
    slots: Tensor
    graph: tuple[str, int, int] | None = None
    expanded: dict[int, Expanded] = field(default_factory=dict)
    gathered: dict[int, Gathered] = field(default_factory=dict)
    copies: Copies | None = None


def step_of(batch: ForwardBatch) -> Step:
    """The step of a batch in eager mode. Raises BatchError for trees and spans, CapacityError for what is too large."""
    return Step(host_lengths(batch), batch.page_table.contiguous(), batch.slot_mapping.to(torch.int32))


def host_lengths(batch: ForwardBatch, *, synchronise: bool = True) -> Lengths:
    """Queries and keys of each request, from the batch's host copies.

    A padded request of a graph (fewer valid keys than queries) reads the null page: its rows mean nothing, and the
    operator must see no more queries than keys. Without host copies the device is read, where that is allowed.
    """
    if batch.tree is not None:
        raise BatchError("a tree of draft tokens", accepted="chains: this torch-npu's operators have no tree mask")
    if batch.spans is not None:
        raise BatchError("spans of tokens that see each other both ways", accepted="causal attention")
    starts, seq_lens = batch.query_start_loc_cpu, batch.seq_lens_cpu
    if starts is None or seq_lens is None:
        if not synchronise:
            raise BatchError(
                "a batch without seq_lens_cpu and query_start_loc_cpu",
                accepted="both: the operators take lengths from the host, and a replay must not wait for the device",
                hint="engines read it in the manifest: requires.host_lengths",
            )
        starts, seq_lens = batch.query_start_loc.cpu(), batch.seq_lens.cpu()
    queries = [end - start for start, end in pairwise(starts.tolist())]
    keys = [max(m, n) for n, m in zip(queries, seq_lens.tolist(), strict=True)]
    check_size(queries, keys)
    return Lengths(queries, keys)


def check_size(queries: list[int], keys: list[int]) -> None:
    """Raise CapacityError for more requests, or more keys of one, than a call takes."""
    if len(queries) > MAX_REQUESTS or max(keys, default=0) > MAX_KEYS:
        raise CapacityError(
            f"{len(queries)} requests of up to {max(keys, default=0)} keys in one step",
            accepted=f"at most {MAX_REQUESTS} requests of {MAX_KEYS} keys: the fused operator's limits",
        )
