"""One step: its requests, and for each sort of layer the parts that its attention is computed in, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar, cast

import torch
from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_wave.tables import NO_BOUND, Positions, Sight, causal_sight, page_of_keys
from attn_wave.work import Reach

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Keys that are attended at once: what each request reaches of them, and what each token sees.

    ``visible`` [T, drafts] int8 is the mask of a tree's own tokens, None elsewhere.
    """

    reaches: tuple[Reach, ...]
    sight: Sight
    visible: Tensor | None = None


@dataclass(slots=True, eq=False)
class Step:
    """The host lengths of a batch, its expanded page table, and what its layers made of them.

    ``queries`` and ``keys`` by request; ``pages`` and ``offsets`` [S] of every key, request after request.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    positions: Positions
    pages: Tensor
    offsets: Tensor
    batch: ForwardBatch
    encoder: tuple[Sequence[int], Tensor, Tensor] | None = None
    made: dict[object, object] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made at the first layer that asks for ``key``."""
        if key not in self.made:
            self.made[key] = make()
        return cast(Made, self.made[key])


def step_of(batch: ForwardBatch, cache: KVCache) -> Step:
    """The step of ``batch``. Raises BatchError without host lengths."""
    if batch.seq_lens_cpu is None or batch.query_start_loc_cpu is None:
        raise BatchError("a batch without its lengths on the host", accepted="seq_lens_cpu and query_start_loc_cpu")
    starts, keys = batch.query_start_loc_cpu.tolist(), batch.seq_lens_cpu.tolist()
    queries = [last - first for first, last in pairwise(starts)]
    pages, offsets = page_of_keys(cache, batch.page_table, keys, batch.device)
    step = Step(queries, keys, Positions.of(queries, keys, batch.device), pages, offsets, batch)
    if batch.encoder_page_table is not None:
        if batch.encoder_seq_lens_cpu is None:
            raise BatchError("a batch without its encoder lengths on the host", accepted="encoder_seq_lens_cpu")
        lengths = batch.encoder_seq_lens_cpu.tolist()
        step.encoder = (lengths, *page_of_keys(cache, batch.encoder_page_table, lengths, batch.device))
    return step


def parts_of(step: Step, layer: AttentionLayer) -> list[Part]:
    """What a cached layer attends to: one part, or the prefix and the drafts of a tree."""
    if layer.cross:
        return [_encoder_part(step)]
    if step.batch.tree is not None:
        return _tree_parts(step, layer.sliding_window)
    window = layer.sliding_window
    spans = step.batch.spans
    own_spans = None if spans is None else spans[step.positions.request]
    sight = causal_sight(step.positions.position, window, own_spans)
    return [Part(_reaches(step.queries, step.keys, causal=spans is None, window=window), sight)]


def given_part(
    queries: Sequence[int], keys: Sequence[int], causal: bool, window: int | None, device: torch.device
) -> Part:
    """Keys that are given, request after request; ``causal`` aligns the last query with the last key."""
    positions = Positions.of(queries, keys, device)
    sight = causal_sight(positions.position, window) if causal else _everything(positions.position)
    return Part(_reaches(queries, keys, causal=causal, window=window), sight)


def _reaches(queries: Sequence[int], keys: Sequence[int], *, causal: bool, window: int | None) -> tuple[Reach, ...]:
    found, row, key = [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        found.append(Reach(row, n, m - n, key, 0, m, causal, window))
        row, key = row + n, key + m
    return tuple(found)


def _everything(positions: Tensor) -> Sight:
    return Sight(torch.zeros_like(positions), torch.full_like(positions, NO_BOUND))


def _encoder_part(step: Step) -> Part:
    if step.encoder is None:
        raise BatchError("a cross layer in a batch without encoder keys", accepted="encoder_page_table and its lengths")
    lengths = step.encoder[0]
    found, row, key = [], 0, 0
    for n, m in zip(step.queries, lengths, strict=True):
        found.append(Reach(row, n, 0, key, 0, m, False, None))
        row, key = row + n, key + m
    return Part(tuple(found), _everything(step.positions.position))


def _tree_parts(step: Step, window: int | None) -> list[Part]:
    """The prefix, seen back to the window of each token's depth, and the draft tokens by their mask."""
    tree = step.batch.tree
    assert tree is not None, "a tree is what this is asked for"
    count = tree.num_draft_tokens
    if any(n != count for n in step.queries):
        raise BatchError(
            f"{sorted(set(step.queries))} draft tokens with a tree of {count}", accepted=f"{count} a request"
        )
    depth = tree.depths()
    visible = tree.visible
    if window is not None:
        visible = visible & (depth[:, :, None] - depth[:, None, :] < window)
    prefix, drafts, row, key = [], [], 0, 0
    for n, m in zip(step.queries, step.keys, strict=True):
        prefix.append(Reach(row, n, m - n, key, 0, m - n, False, None))
        drafts.append(Reach(row, n, m - n, key + m - n, m - n, m, False, None))
        row, key = row + n, key + m
    first = torch.tensor([m - n for n, m in zip(step.queries, step.keys, strict=True)]).to(depth.device)
    positions = (first[:, None] + depth).flatten()
    low = torch.zeros_like(positions) if window is None else positions - window + 1
    return [
        Part(tuple(prefix), Sight(low, torch.full_like(positions, NO_BOUND))),
        Part(tuple(drafts), _everything(positions), visible.flatten(0, 1).to(torch.int8).contiguous()),
    ]
