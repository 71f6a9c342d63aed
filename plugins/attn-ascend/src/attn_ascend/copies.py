"""A cache that the operators cannot read in place: the pages of a step, copied next to each other.

The operators take no strides, and the contract lets an engine wrap whatever it has (keys and values in one tensor,
say). That is right, and it costs each layer a copy of the step's pages, so that the backend says it once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_ascend.step import Step


class StridedCacheWarning(UserWarning):
    """A cache whose pages are copied in every step."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Which pages a step names, [N] int64 on the device, and the same step over copies of them in that order."""

    pages: Tensor
    step: Step


def in_place(cache: KVCache) -> bool:
    """Whether the operators can read every layer's keys and values where they are."""
    return all(tensor.is_contiguous() for tensor in _tensors(cache))


def warn_of_copies(cache: KVCache) -> None:
    """Say, once for a program, that this cache costs copies."""
    if not in_place(cache):
        text = "ascend: a cache of strides cannot be read in place, so that every layer copies the pages of its step"
        warnings.warn(text, StridedCacheWarning, stacklevel=3)


def readable(step: Step, page_size: int, *tensors: Tensor) -> tuple[Step, Sequence[Tensor]]:
    """``tensors`` [pages, page_size, ...] as the operators can read them, and the step that finds its pages there."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return step, tensors
    if step.copies is None:
        step.copies = _copies(step, page_size)
    return step.copies.step, [tensor.index_select(0, step.copies.pages) for tensor in tensors]


def _copies(step: Step, page_size: int) -> Copies:
    counts = [-(-keys // page_size) for keys in step.lengths.keys]
    pages = named_pages(step.table, range(len(counts)), counts)
    table = torch.tensor(places(counts), dtype=torch.int32, device=step.table.device).view(len(counts), -1)
    return Copies(pages, replace(step, table=table, expanded={}, gathered={}, copies=None))


def named_pages(table: Tensor, requests: Iterable[int], counts: Sequence[int]) -> Tensor:
    """[N] int64: the first ``counts[i]`` pages of each of these requests, one after the other."""
    rows = torch.tensor([b for b, count in zip(requests, counts, strict=True) for _ in range(count)], dtype=torch.int64)
    columns = torch.tensor([i for count in counts for i in range(count)], dtype=torch.int64)
    return table[rows.to(table.device), columns.to(table.device)].long()


def places(counts: Sequence[int]) -> list[list[int]]:
    """For each request the places of its pages among the copies, filled up with 0; at least one column."""
    width, first, rows = max([1, *counts]), 0, []
    for count in counts:
        rows.append([*range(first, first + count), *[0] * (width - count)])
        first += count
    return rows


def _tensors(cache: KVCache) -> Iterable[Tensor]:
    both = [tensor for i in cache.layer_ids for tensor in (cache.k(i), cache.v(i))]
    return [tensor for tensor in both if tensor is not None]
