"""What one step of torch_native needs beyond its batch: host lengths, or the fixed shapes of a captured graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch, ForwardMode


@dataclass(slots=True)
class HostLengths:
    """The lengths of a step as host integers, for the paths that go through the requests one by one."""

    seq_lens: list[int]
    query_start: list[int]
    encoder_seq_lens: list[int] | None

    @classmethod
    def of(cls, batch: ForwardBatch) -> HostLengths:
        """From the batch's host copies; without them the device is read once."""
        return cls(
            seq_lens=_host(batch.seq_lens_cpu, batch.seq_lens),
            query_start=_host(batch.query_start_loc_cpu, batch.query_start_loc),
            encoder_seq_lens=None
            if batch.encoder_seq_lens is None
            else _host(batch.encoder_seq_lens_cpu, batch.encoder_seq_lens),
        )


def _host(copy: Tensor | None, original: Tensor) -> list[int]:
    values: list[int] = (original if copy is None else copy).tolist()
    return values


@dataclass(slots=True)
class PaddedStep:
    """A step where every request has the same number of new tokens: tensors of fixed shapes, no host lengths.

    ``query_len`` new tokens a request; ``page_table`` [B, width] and ``seq_lens`` [B] may be longer-lived buffers that
    a replayed graph reads.
    """

    query_len: int
    seq_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    tree: Tensor | None = None
    encoder_seq_lens: Tensor | None = None
    encoder_page_table: Tensor | None = None


def check_tree(batch: ForwardBatch) -> None:
    """Raise BatchError for a tree in a step that cannot have one: nothing may be ignored."""
    if batch.tree is None:
        return
    q = batch.tree.num_draft_tokens
    if batch.mode is not ForwardMode.TARGET_VERIFY or batch.num_tokens != batch.batch_size * q:
        raise BatchError(
            f"a tree of {q} draft tokens with mode {batch.mode.name},"
            f" {batch.num_tokens} tokens, {batch.batch_size} requests",
            accepted="TARGET_VERIFY, and as many tokens for every request as the tree has",
        )
