"""One step: its requests, and for each sort of layer the parts that its attention is computed in, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_wave.tables import KeyPlaces, Sight, causal_sight, everything
from attn_wave.work import Reach

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Keys that are attended at once: what each request reaches of them, and what each token sees.

    ``visible`` [T, drafts] int8 is the mask of a tree's own tokens, None elsewhere.
    """

    reach: Reach
    sight: Sight
    visible: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """New tokens and keys of each request, [B] int64 each; ``each`` is how many tokens all have in a captured step."""

    queries: Tensor
    keys: Tensor
    each: int | None = None

    @classmethod
    def of(cls, starts: Tensor, keys: Tensor) -> Lengths:
        """From ``starts`` [B + 1] and ``keys`` [B]."""
        return cls(torch.diff(starts.long()), keys.long())

    def positions(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """(request, position) of each new token [T]: the last ``queries[b]`` of ``keys[b]`` positions."""
        token = torch.arange(num_tokens, device=self.keys.device)
        if self.each is None:
            rows = torch.arange(len(self.queries), device=token.device)
            request = torch.repeat_interleave(rows, self.queries, output_size=num_tokens)
        else:
            request = token.div(max(1, self.each), rounding_mode="floor")
        within = token - (self.queries.cumsum(0) - self.queries)[request]
        return request, (self.keys - self.queries)[request] + within

    def reach(self, places: KeyPlaces, begin: Tensor, end: Tensor, *, causal: bool, window: int | None) -> Reach:
        """What the new tokens reach of the keys from ``begin`` to ``end``."""
        row, position = self.queries.cumsum(0) - self.queries, self.keys - self.queries
        return Reach(row, self.queries, position, places.first, begin, end, causal, window, self.each, places.most)


@dataclass(slots=True, eq=False)
class Step:
    """A batch, and what its layers made of it. ``each``: new tokens of every request, in a step that is captured."""

    batch: ForwardBatch
    page_size: int
    each: int | None = None
    made: dict[object, object] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made at the first layer that asks for ``key``.

        While a graph is captured it is made again, as a part of the graph: a replay has other lengths.
        """
        where = (is_capturing(), key)
        if where not in self.made:
            self.made[where] = make()
        return cast(Made, self.made[where])

    def lengths(self) -> Lengths:
        """On the device."""
        return self.once("lengths", self._lengths)

    def planned(self) -> Lengths:
        """The lengths that the work list is made of: the host's, or in a captured step the device's own."""
        return self.lengths() if self.each is not None else self.once("planned", self._planned)

    def places(self, cross: bool = False) -> KeyPlaces:
        """Where the keys lie, the encoder's for a cross layer."""
        return self.once(("places", cross), lambda: self._places(cross))

    def encoder_lengths(self) -> Tensor:
        """[B] int64, where `planned` is. Raises BatchError for a batch without an encoder."""
        return self._encoder()[2]

    def _lengths(self) -> Lengths:
        batch = self.batch
        if self.each is None:
            return Lengths.of(batch.query_start_loc, batch.seq_lens)
        return Lengths(torch.full_like(batch.seq_lens, self.each, dtype=torch.int64), batch.seq_lens.long(), self.each)

    def _planned(self) -> Lengths:
        batch = self.batch
        if batch.seq_lens_cpu is None or batch.query_start_loc_cpu is None:
            raise BatchError("a batch without its lengths on the host", accepted="seq_lens_cpu and query_start_loc_cpu")
        return Lengths.of(batch.query_start_loc_cpu, batch.seq_lens_cpu)

    def _places(self, cross: bool) -> KeyPlaces:
        batch = self.batch
        table, lengths, planned = batch.page_table, batch.seq_lens, batch.seq_lens
        if cross:
            table, lengths, planned = self._encoder()
        elif self.each is None:
            planned = self.planned().keys
        if self.each is not None:
            return KeyPlaces.whole(table, self.page_size)
        return KeyPlaces.of(table, lengths.long(), planned, self.page_size)

    def _encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """Page table, lengths, and the lengths as planned. Raises BatchError for a batch without an encoder."""
        batch = self.batch
        planned = batch.encoder_seq_lens_cpu if self.each is None else batch.encoder_seq_lens
        if batch.encoder_page_table is None or batch.encoder_seq_lens is None or planned is None:
            raise BatchError(
                "a cross layer in a batch without encoder keys",
                accepted="encoder_page_table, encoder_seq_lens and encoder_seq_lens_cpu",
            )
        return batch.encoder_page_table, batch.encoder_seq_lens, planned.long()


def is_capturing() -> bool:
    """Whether the current stream is being captured now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def step_of(batch: ForwardBatch, page_size: int) -> Step:
    """The step of ``batch``, its page table expanded. Raises BatchError without host lengths."""
    step = Step(batch, page_size)
    step.places()
    return step


def parts_of(step: Step, layer: AttentionLayer) -> list[Part]:
    """What a cached layer attends to: one part, or the prefix and the drafts of a tree."""
    if layer.cross:
        return [_encoder_part(step)]
    if step.batch.tree is not None:
        return _tree_parts(step, layer.sliding_window)
    planned, window, spans = step.planned(), layer.sliding_window, step.batch.spans
    request, position = step.lengths().positions(step.batch.num_tokens)
    sight = causal_sight(position, window, None if spans is None else spans[request])
    nothing = torch.zeros_like(planned.keys)
    reach = planned.reach(step.places(), nothing, planned.keys, causal=spans is None, window=window)
    return [Part(reach, sight)]


def given_part(starts: Tensor, key_starts: Tensor, causal: bool, window: int | None, device: torch.device) -> Part:
    """Keys that are given, request after request, by ``starts`` and ``key_starts`` [B + 1] on the host.

    ``causal`` aligns the last query with the last key.
    """
    planned = Lengths.of(starts, torch.diff(key_starts))
    own = Lengths(planned.queries.to(device), planned.keys.to(device))
    _, position = own.positions(int(starts[-1]))
    sight = causal_sight(position, window) if causal else everything(position)
    first = key_starts[:-1].long()
    places = KeyPlaces(first, first, first)
    return Part(planned.reach(places, torch.zeros_like(first), planned.keys, causal=causal, window=window), sight)


def _encoder_part(step: Step) -> Part:
    lengths = step.encoder_lengths()
    reach = step.planned().reach(step.places(True), torch.zeros_like(lengths), lengths, causal=False, window=None)
    return Part(reach, everything(step.batch.slot_mapping))


def _tree_parts(step: Step, window: int | None) -> list[Part]:
    """The prefix, seen back to the window of each token's depth, and the draft tokens by their mask."""
    tree, planned, lengths = step.batch.tree, step.planned(), step.lengths()
    assert tree is not None, "a tree is what this is asked for"
    count = tree.num_draft_tokens
    same = count == step.each if step.each is not None else bool((planned.queries == count).all())
    if not same:
        raise BatchError(f"a tree of {count} for requests with other numbers of tokens", accepted=f"{count} a request")
    depth, visible = tree.depths(), tree.visible
    if window is not None:
        visible = visible & (depth[:, :, None] - depth[:, None, :] < window)
    positions = ((lengths.keys - lengths.queries)[:, None] + depth).flatten()
    sight = everything(positions)
    if window is not None:
        sight = Sight(positions - window + 1, sight.high)
    prefix = planned.keys - planned.queries
    before = planned.reach(step.places(), torch.zeros_like(prefix), prefix, causal=False, window=None)
    drafts = planned.reach(step.places(), prefix, planned.keys, causal=False, window=None)
    return [
        Part(before, sight),
        Part(replace(drafts, most=count), everything(positions), visible.flatten(0, 1).to(torch.int8).contiguous()),
    ]
