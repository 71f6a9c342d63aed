"""What a step of torch_native is: something that attends for one layer at a time, once everything is in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer


class Step(Protocol):
    """The part of ``plan_state`` that the forwards use."""

    #: [T] int64: where this step's keys and values go
    slot_mapping: Tensor

    def attend(
        self, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(out, lse)``, [T, Hq, Dv] and fp32 [T, Hq], without the sink; lse may be None where it is not needed."""
        ...


@dataclass(slots=True)
class MixedStep:
    """Decodes first, then prompts: each part attends in its own way."""

    slot_mapping: Tensor
    num_decodes: int
    decode: Step
    extend: Step

    def attend(
        self, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        n = self.num_decodes
        first = self.decode.attend(q[:n], layer, kv_cache, need_lse)
        second = self.extend.attend(q[n:], layer, kv_cache, need_lse)
        lse = None if first[1] is None or second[1] is None else torch.cat([first[1], second[1]])
        return torch.cat([first[0], second[0]]), lse


def check_step(batch: ForwardBatch) -> None:
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


def missing_encoder(layer: AttentionLayer) -> BatchError:
    """The error for a cross layer in a batch that has no encoder."""
    return BatchError(
        f"layer {layer.layer_id} is a cross layer, and the batch has no encoder",
        accepted="encoder_seq_lens and encoder_page_table",
    )
