"""Tree verify as two passes: all drafts over the prefix they share, then each draft over the few keys only it sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OwnKeys:
    """The second pass: draft i of request b is row b*q + i, with a page table of its own whose pages are one slot.

    slots [B*q, q] int32: slots of the cache seen as pages of one token; counts [B*q] int32: how many are valid.
    """

    slots: Tensor
    counts: Tensor


def prefix_window(window: int | None, q: int) -> tuple[int, int] | None:
    """(left, right) of the prefix pass, whose rows are the q drafts over the prefix alone; None: no pass is needed.

    The library counts a window from the place in the row: row i of q rows over n keys sees keys from
    i + n - q - left on. Left = W - 1 - q puts that at n + i - W + 1, where it would be in a chain. A tree's draft
    stands at its depth d <= i, so it may see up to i - d keys more; those go to the second pass, which holds them all
    in q slots. With W <= q the window would be negative, which the library reads as none: then the second pass, again
    of at most q slots, sees everything.
    """
    if window is None:
        return -1, -1
    return (window - 1 - q, -1) if window > q else None


def own_keys(
    visible: Tensor, prefix_lens: Tensor, page_table: Tensor, *, page_size: int, page_stride: int, window: int | None
) -> OwnKeys:
    """The keys that the prefix pass leaves over, for each draft.

    visible [B, q, q] bool (`TreeMask`), prefix_lens [B] int32, page_table [B, pages] int32. ``page_stride``: slots from
    one page to the next in the cache seen as pages of one token (``page_size`` if pages follow each other).
    """
    if visible.is_cuda:
        from attn_fa3.kernels.tree import launch_own_keys

        return OwnKeys(*launch_own_keys(visible, prefix_lens, page_table, page_size, page_stride, window))
    return _own_keys_on_host(visible, prefix_lens, page_table, page_size, page_stride, window)


def _own_keys_on_host(
    visible: Tensor, prefix_lens: Tensor, page_table: Tensor, page_size: int, page_stride: int, window: int | None
) -> OwnKeys:
    q = visible.shape[1]
    depth = visible.sum(-1) - 1
    prefix = prefix_lens.long()[:, None]
    low, high = leftover_prefix(depth, prefix, q, window)
    seen = visible if window is None else visible & (depth[:, None, :] > depth[:, :, None] - window)
    column = torch.arange(q, device=visible.device)

    def slot_at(position: Tensor) -> Tensor:
        page = (position // page_size).clamp(max=page_table.shape[1] - 1)
        pages = page_table.long()[:, None, :].expand(-1, q, -1).gather(2, page)
        return pages * page_stride + position % page_size

    from_prefix = (high - low)[:, :, None]
    slots = slot_at(low[:, :, None] + column)
    draft_slots = slot_at((prefix[:, :, None] + column).expand(-1, q, -1))
    place = torch.where(seen, seen.cumsum(-1) - 1 + from_prefix, q)  # column q takes what no row sees
    slots = torch.cat([slots, slots[:, :, :1]], dim=-1).scatter(2, place, draft_slots)
    counts = from_prefix.squeeze(-1) + seen.sum(-1)
    return OwnKeys(slots[:, :, :q].flatten(0, 1).int(), counts.flatten().int())


def leftover_prefix(depth: Tensor, prefix: Tensor, q: int, window: int | None) -> tuple[Tensor, Tensor]:
    """[B, q] first and one past the last position of the prefix keys that only the second pass reads."""
    if window is None:
        return torch.zeros_like(depth), torch.zeros_like(depth)
    row = torch.arange(q, device=depth.device)
    none = torch.zeros_like(prefix)
    low = torch.minimum(torch.maximum(prefix + depth - window + 1, none), prefix)
    high = (
        torch.minimum(torch.maximum(prefix + row - window + 1, none), prefix) if window > q else prefix.expand_as(low)
    )
    return low, torch.maximum(high, low)
