"""Index tables of a step, on the device: where rows of q, k and v begin in units of 16 bytes, and what a row sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from attn_core.errors import ConfigError
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_wave.variant import UNIT

#: An interval that every position lies in.
NO_BOUND: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """The tokens of a step, [T] each: the request they are of, and the position they stand at."""

    request: Tensor
    position: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Positions:
        """The last ``queries[b]`` of ``keys[b]`` positions. Made on the host: nothing waits for the device."""
        counts = torch.tensor(queries)
        request = torch.repeat_interleave(torch.arange(len(queries)), counts)
        first = torch.tensor(keys) - counts
        within = torch.arange(len(request)) - (counts.cumsum(0) - counts)[request]
        return cls(request.to(device), (first[request] + within).to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """The interval of positions, low to high, that each token sees: [T] each."""

    low: Tensor
    high: Tensor

    def rows(self, group: int) -> tuple[Tensor, Tensor]:
        """The same for each query row [T * G] int32."""
        low, high = (
            t.clamp(0, NO_BOUND).to(torch.int32).repeat_interleave(group).contiguous() for t in (self.low, self.high)
        )
        return low, high


def causal_sight(positions: Tensor, window: int | None, spans: Tensor | None = None) -> Sight:
    """Up to the token itself, or to the end of its span; ``spans`` [T, S, 2] are those of its request."""
    high = positions + 1
    if spans is not None and spans.shape[1]:
        inside = (spans[..., 0] <= positions[:, None]) & (positions[:, None] < spans[..., 1])
        high = torch.maximum(high, torch.where(inside, spans[..., 1], 0).amax(1))
    low = torch.zeros_like(positions) if window is None else positions - window + 1
    return Sight(low, high)


def in_units(tensor: Tensor) -> bool:
    """Whether every row of ``tensor`` begins at a multiple of 16 bytes, and is contiguous."""
    strides = [tensor.stride(i) for i in range(tensor.dim() - 1) if tensor.shape[i] > 1]
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(s % UNIT == 0 for s in strides)


def unit_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides in units, but for the last dimension; 0 where it has only one."""
    return tuple(tensor.stride(i) // UNIT if tensor.shape[i] > 1 else 0 for i in range(tensor.dim() - 1))


def check_pool(layer_id: int, name: str, pool: Tensor) -> None:
    """Raises ConfigError for a cache whose rows a kernel cannot address."""
    if not in_units(pool):
        raise ConfigError(
            f"layer {layer_id}: {name} of strides {pool.stride()} at address {pool.data_ptr():#x}",
            accepted=f"rows that begin at multiples of {UNIT} elements",
        )
    reach = sum((n - 1) * s for n, s in zip(pool.shape, pool.stride(), strict=True))
    if reach // UNIT >= 2**31:
        raise ConfigError(f"layer {layer_id}: {name} spans {reach} elements", accepted=f"up to {2**31 * UNIT}")


def query_rows(q: Tensor, group: int) -> Tensor:
    """[T * G] int32: where the rows of the first KV head begin in q [T, Hq, D]."""
    token, head = unit_strides(q)
    rows = torch.arange(q.shape[0], device=q.device)[:, None] * token + torch.arange(group, device=q.device) * head
    return rows.flatten().to(torch.int32)


def paged_rows(pool: Tensor, pages: Tensor, offsets: Tensor) -> Tensor:
    """[S] int32: where the rows of the first head begin in pool [pages, page_size, Hkv, D]."""
    page, token, _ = unit_strides(pool)
    return (pages * page + offsets * token).to(torch.int32)


def page_of_keys(
    cache: KVCache, page_table: Tensor, lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(page, offset) of the first ``lengths[b]`` keys of each request, one after the other: the table, expanded."""
    request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    position = torch.arange(len(request)) - (ends - torch.tensor(lengths, dtype=torch.int64))[request]
    request, position = request.to(device), position.to(device)
    return page_table[request, position // cache.page_size].long(), position % cache.page_size
