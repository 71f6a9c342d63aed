"""Index tables of a step, on the device: where rows of q, k and v begin in units of 16 bytes, and what a row sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from attn_core.errors import ConfigError
from torch import Tensor

from attn_wave.variant import UNIT

#: An interval that every position lies in.
NO_BOUND: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """The interval of positions, low to high, that each token sees: [T] each."""

    low: Tensor
    high: Tensor

    def rows(self, group: int) -> tuple[Tensor, Tensor]:
        """The same for each query row [T * G] int32."""
        low, high = (
            t.clamp(0, NO_BOUND).to(torch.int32)[:, None].expand(-1, group).contiguous().flatten()
            for t in (self.low, self.high)
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


def everything(like: Tensor) -> Sight:
    """Every position, for as many tokens as ``like`` has."""
    return Sight(torch.zeros_like(like), torch.full_like(like, NO_BOUND))


@dataclass(frozen=True, slots=True, eq=False)
class KeyPlaces:
    """The page and the place in it of every key, as they broadcast, and where each request's position 0 is among them.

    ``first`` [B] lies where the work is planned. ``most``: keys that a request can have in a captured step.
    """

    pages: Tensor
    offsets: Tensor
    first: Tensor
    most: int = 0

    @classmethod
    def of(cls, page_table: Tensor, lengths: Tensor, planned: Tensor, page_size: int) -> KeyPlaces:
        """The first ``lengths[b]`` keys of each request, request after request; ``planned`` is their host copy."""
        device, total = page_table.device, int(planned.sum())
        request = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=total)
        position = torch.arange(total, device=device) - (lengths.cumsum(0) - lengths)[request]
        pages = page_table[request, position.div(page_size, rounding_mode="floor")].long()
        return cls(pages, position % page_size, planned.cumsum(0) - planned)

    @classmethod
    def whole(cls, page_table: Tensor, page_size: int) -> KeyPlaces:
        """Everything that ``page_table`` [B, columns] has room for: a shape that no length changes."""
        requests, columns = page_table.shape
        device = page_table.device
        first = torch.arange(requests, device=device) * (columns * page_size)
        return cls(page_table[:, :, None].long(), torch.arange(page_size, device=device), first, columns * page_size)

    def rows(self, pool: Tensor) -> Tensor:
        """[S] int32: where the rows of the first head begin in pool [pages, page_size, Hkv, D], in units."""
        page, token, _ = unit_strides(pool)
        return (self.pages * page + self.offsets * token).to(torch.int32).flatten()


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
