"""Faults of who sees whom: windows, prefixes, causality, trees, spans, encoders."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.liars.base import Mutant, breaks, position_of_token, request_of_token


@breaks("sliding_window")
class WindowOneMore(Mutant):
    """The window is inclusive on both sides: one key too many."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        window = layer.sliding_window
        return layer if window is None else replace(layer, sliding_window=window + 1)


@breaks("sliding_window")
class WindowOneLess(Mutant):
    """The window has one key too few."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        window = layer.sliding_window
        return layer if window is None else replace(layer, sliding_window=max(1, window - 1))


@breaks("sliding_window")
class WindowIgnoredOnDecode(Mutant):
    """Decodes see everything."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, sliding_window=None) if batch.mode is ForwardMode.DECODE else layer


@breaks("several_kinds", "sliding_window")
class WindowOfTheFirstLayer(Mutant):
    """All layers of a step get the window of the first: the metadata was prepared for one kind."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        if layer.cross or not batch.num_tokens:
            return layer
        windows = self.__dict__.setdefault("windows", {})
        window = windows.setdefault(id(batch), (batch, layer.sliding_window))[1]
        return replace(layer, sliding_window=window)


@breaks("sliding_window", "verify_tree")
class WindowCountsPlacesInTrees(Mutant):
    """In a tree the window counts rows, not positions: a token deep in a late branch loses keys that it must see."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if batch.tree is None or layer.sliding_window is None:
            return self.honest(q, layer, batch)
        depth = (batch.tree.visible.sum(-1) - 1).flatten()
        place = torch.arange(batch.tree.num_draft_tokens, device=q.device).repeat(batch.batch_size)
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for late in (place - depth).tolist():
            window = max(1, layer.sliding_window - late)
            out, lse = self.honest(q, replace(layer, sliding_window=window), batch)
            outs.append(out[len(outs)])
            lses.append(lse[len(lses)])
        return torch.stack(outs), torch.stack(lses)


@breaks("prefix")
class PrefixOneShort(Mutant):
    """With a cached prefix every query is thought to stand one place earlier."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        if batch.mode is not ForwardMode.EXTEND or batch.spans is not None:
            return batch
        new = batch.query_start_loc.diff()
        lengths = torch.where(batch.seq_lens > new, batch.seq_lens - 1, batch.seq_lens)
        return with_lengths(batch, lengths)


@breaks("prefix")
class CausalFromTheTopLeft(Mutant):
    """The causal mask is aligned at the first key: query i sees keys 0..i, wherever it stands."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        whole = batch.mode is ForwardMode.EXTEND and batch.spans is None and layer.sliding_window is None
        if not whole or layer.cross:
            return self.honest(q, layer, batch)
        place = torch.arange(q.shape[0], device=q.device) - batch.query_start_loc[request_of_token(batch)]
        return self.honest_with_lengths(q, layer, batch, place + 1)


@breaks("verify_tree")
class TreeIgnored(Mutant):
    """The draft tokens of a tree are taken for a chain."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        return replace(batch, tree=None)


@breaks("verify_tree")
class TreeTransposed(Mutant):
    """Ancestors see their descendants, not the other way round."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        if batch.tree is None:
            return batch
        return replace(batch, tree=TreeMask(batch.tree.visible.transpose(1, 2).contiguous()))


@breaks("verify_chain")
class ChainSeesItsFuture(Mutant):
    """The draft tokens of a chain see each other both ways."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if batch.mode is not ForwardMode.TARGET_VERIFY or batch.tree is not None or layer.cross:
            return self.honest(q, layer, batch)
        everything = batch.seq_lens[request_of_token(batch)]
        return self.honest_with_lengths(q, layer, batch, everything)


@breaks("bidirectional_spans")
class SpansIgnored(Mutant):
    """Tokens of an image see only those before them."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        return replace(batch, spans=None)


@breaks("bidirectional_spans")
class SpansOneShort(Mutant):
    """The last token of each span is left out."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        if batch.spans is None:
            return batch
        shorter = batch.spans.clone()
        shorter[..., 1] = (shorter[..., 1] - 1).clamp(min=0)
        return replace(batch, spans=shorter)


@breaks("cross")
class CrossKeysCausal(Mutant):
    """A query at position p sees the encoder's first p + 1 keys."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if not layer.cross or batch.encoder_seq_lens is None:
            return self.honest(q, layer, batch)
        every = batch.encoder_seq_lens[request_of_token(batch)]
        return self.honest_with_lengths(q, layer, batch, torch.minimum(every, position_of_token(batch) + 1))


@breaks("not_causal", "ragged")
class RaggedAlwaysCausal(Mutant):
    """Given keys are always attended to causally."""

    def forward_ragged(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, **options: object):  # type: ignore[no-untyped-def]
        return super().forward_ragged(q, k, v, layer, **{**options, "causal": True})  # type: ignore[arg-type]


def with_lengths(batch: ForwardBatch, lengths: Tensor) -> ForwardBatch:
    """The batch with other sequence lengths."""
    return replace(batch, seq_lens=lengths, seq_lens_cpu=lengths.cpu())
