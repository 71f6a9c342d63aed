"""What one step looks like to the kernels: the batch's tensors in the form they take, and what was prepared from
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from torch import Tensor

from attn_triton.geometry import power_of_two_from
from attn_triton.kernels.write import tree_depth_kernel
from attn_triton.launch import Launchers


@dataclass(slots=True, eq=False)
class Keys:
    """One kind of keys of the requests: their own, or the encoder's. lengths [B] int32, pages [B, max_pages] int32.

    ``most`` bounds the lengths, ``host`` lists them if the host knows them.
    """

    lengths: Tensor
    pages: Tensor
    most: int
    host: list[int] | None


@dataclass(slots=True, eq=False)
class Step:
    """The plan state of a batch. ``single``: every request has one query, token b is request b's.

    ``tree`` [B, q, q] uint8 with ``depths`` [B, q] int32, ``spans`` [B, S, 2] int32. ``bound`` holds what layers of one
    geometry launch in this step, ``schedules`` the cuts of the line of blocks. ``captured``: the tensors are the shared
    buffers of CUDA graphs, so nothing may be decided from what they hold now.
    """

    batch_size: int
    num_tokens: int
    max_query_len: int
    single: bool
    verify: bool
    starts: Tensor
    slots: Tensor
    own: Keys
    encoder: Keys | None = None
    encoder_slots: Tensor | None = None
    tree: Tensor | None = None
    depths: Tensor | None = None
    spans: Tensor | None = None
    captured: bool = False
    bound: dict[Any, Any] = field(default_factory=dict)
    schedules: dict[Any, Any] = field(default_factory=dict)

    def keys(self, cross: bool) -> Keys:
        """The keys that a layer attends to. Raises BatchError for a cross layer in a batch without an encoder."""
        if not cross:
            return self.own
        if self.encoder is None:
            raise BatchError(
                "a cross layer in a batch without an encoder", accepted="encoder_seq_lens and encoder_page_table"
            )
        return self.encoder


def step_of(batch: ForwardBatch) -> Step:
    """The step over the batch's own tensors. Raises BatchError for what the kernels cannot mean."""
    tree = tree_bits(batch)
    encoder = None
    if batch.encoder_seq_lens is not None and batch.encoder_page_table is not None:
        encoder = Keys(
            _aligned(batch.encoder_seq_lens),
            _rows(batch.encoder_page_table),
            batch.max_encoder_seq_len,
            _listed(batch.encoder_seq_lens_cpu),
        )
    return Step(
        batch_size=batch.batch_size,
        num_tokens=batch.num_tokens,
        max_query_len=batch.max_query_len,
        single=batch.mode is ForwardMode.DECODE,
        verify=batch.mode is ForwardMode.TARGET_VERIFY,
        starts=_aligned(batch.query_start_loc),
        slots=_aligned(batch.slot_mapping),
        own=Keys(_aligned(batch.seq_lens), _rows(batch.page_table), batch.max_seq_len, _listed(batch.seq_lens_cpu)),
        encoder=encoder,
        encoder_slots=batch.encoder_slot_mapping,
        tree=tree,
        spans=None if batch.spans is None or not batch.spans.shape[1] else batch.spans.to(torch.int32).contiguous(),
    )


def tree_bits(batch: ForwardBatch) -> Tensor | None:
    """The tree of a batch as [B, q, q] uint8. Raises BatchError for a tree of another shape than the step, or with
    spans.
    """
    if batch.tree is None:
        return None
    visible = batch.tree.visible
    q = visible.shape[-1]
    if batch.spans is not None:
        raise BatchError("a tree and spans in one batch", accepted="one of them: draft tokens are text")
    if tuple(visible.shape) != (batch.batch_size, q, q) or q * batch.batch_size != batch.num_tokens:
        raise BatchError(
            f"a tree {tuple(visible.shape)} for {batch.batch_size} requests and {batch.num_tokens} tokens",
            accepted="[B, q, q] with q draft tokens for each request",
        )
    return visible.contiguous().view(torch.uint8)


def _rows(table: Tensor) -> Tensor:
    return _aligned(table if table.stride(-1) == 1 else table.contiguous())


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor``, copied if it does not begin at 16 bytes, as a part of a mixed batch may: kernels are compiled for
    whether addresses do, and no step may wait for a compiler.
    """
    return tensor.clone() if tensor.data_ptr() & 15 else tensor


def _listed(lengths: Tensor | None) -> list[int] | None:
    return None if lengths is None else lengths.tolist()


def prepare_tree(step: Step, launchers: Launchers) -> None:
    """The depths of a step's draft tokens, counted on the device."""
    if step.tree is None:
        return
    batch, q, _ = step.tree.shape
    if step.depths is None:
        step.depths = torch.empty(batch, q, dtype=torch.int32, device=step.tree.device)
    launcher = launchers.get(tree_depth_kernel, {"Q_PADDED": power_of_two_from(max(2, q))}, {"num_warps": 1}, ())
    launcher((batch * q, 1), [step.tree, step.depths, q])
