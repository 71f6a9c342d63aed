"""The buffers that CUDA graphs share, and how a replay fills them: one launch for the batch, one for each schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from attn_core.errors import BatchError, CapacityError, ConfigError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_triton.geometry import power_of_two_from
from attn_triton.kernels.write import refresh_kernel
from attn_triton.launch import Bound, Launchers
from attn_triton.step import Keys, Step, step_of
from attn_triton.workspace import Workspace

#: Page ids or slots that a program copies at a time.
COPY_CHUNK = 128
#: Positions of the sources among the arguments of the refresh kernel: lengths, starts, pages, slots, tree, encoder's.
MOVING: Final = (0, 2, 4, 6, 8, 11, 13)
#: Row strides of the two page tables that are copied.
PAGES_STRIDE, ENCODER_STRIDE = 17, 19


@dataclass(slots=True, eq=False)
class Captured:
    """A step over the shared buffers, and the launch that fills them from a batch."""

    step: Step
    refresh: Bound

    def fill(self, batch: ForwardBatch) -> None:
        """Copy ``batch`` into the buffers and cut its keys anew, on the device. Raises BatchError, CapacityError."""
        step, refresh = self.step, self.refresh
        if batch.max_seq_len > step.own.most or batch.max_query_len > step.max_query_len:
            raise CapacityError(
                f"a replay with sequences of {batch.max_seq_len} tokens, {batch.max_query_len} new",
                accepted=f"at most {step.own.most}, {step.max_query_len} new, as captured",
            )
        tree = self._tree(batch)
        encoder_lengths, encoder_pages = self._encoder(batch)
        refresh.place(
            batch.seq_lens, batch.query_start_loc, batch.page_table, batch.slot_mapping, tree, encoder_lengths,
            encoder_pages,
        )  # fmt: skip
        refresh.values[PAGES_STRIDE] = batch.page_table.stride(0)
        if encoder_pages is not None:
            refresh.values[ENCODER_STRIDE] = encoder_pages.stride(0)
        refresh.launch(step.batch_size)
        for schedule in step.schedules.values():
            schedule.run()

    def _tree(self, batch: ForwardBatch) -> Tensor | None:
        wanted = self.step.tree
        if wanted is None:
            return None
        tree = None if batch.tree is None else batch.tree.visible
        if tree is None or not tree.is_contiguous() or tree.shape != wanted.shape:
            raise BatchError(
                "a replay without the tree that was captured", accepted=f"a contiguous tree {tuple(wanted.shape)}"
            )
        return tree.view(torch.uint8)

    def _encoder(self, batch: ForwardBatch) -> tuple[Tensor | None, Tensor | None]:
        wanted = self.step.encoder
        if wanted is None:
            return None, None
        if batch.encoder_seq_lens is None or batch.encoder_page_table is None:
            raise BatchError(
                "a replay without the encoder that was captured", accepted="encoder_seq_lens and encoder_page_table"
            )
        if batch.max_encoder_seq_len > wanted.most:
            raise CapacityError(
                f"a replay with encoders of {batch.max_encoder_seq_len} tokens",
                accepted=f"at most {wanted.most}, as captured",
            )
        return batch.encoder_seq_lens, batch.encoder_page_table


class GraphBuffers:
    """What every captured graph of a backend reads: lengths, starts, pages and slots of the step, and the partial
    results.

    Trees and encoders have buffers of their own for each captured size. One graph runs at a time.
    """

    def __init__(
        self, config: AttentionConfig, cache: KVCache, max_batch_size: int, max_num_tokens: int, part_elements: int
    ) -> None:
        if max_batch_size < 1 or max_num_tokens < max_batch_size:
            raise ConfigError(
                f"graphs of {max_batch_size} requests and {max_num_tokens} tokens",
                accepted="at least one of each, a token for each request",
            )
        device = cache.device
        context = config.max_context_len
        columns = cache.num_pages - 1 if context is None else -(-context // cache.page_size)
        self.max_batch_size, self.max_num_tokens, self.page_size = max_batch_size, max_num_tokens, cache.page_size
        self.lengths = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.starts = torch.zeros(max_batch_size + 1, dtype=torch.int32, device=device)
        self.pages = torch.zeros(max_batch_size, max(1, columns), dtype=torch.int32, device=device)
        self.slots = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        self.workspace = Workspace(device)
        self.workspace.reserve(part_elements)
        self._captured: dict[Any, Captured] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what is allocated beside the page table."""
        return self.lengths.nbytes + self.starts.nbytes + self.slots.nbytes + self.workspace.nbytes

    def capture(self, batch: ForwardBatch, launchers: Launchers) -> Step:
        """A step of the form of ``batch`` over the buffers, filled from it. Raises CapacityError for one that is too
        large.
        """
        if batch.batch_size > self.max_batch_size or batch.num_tokens > self.max_num_tokens:
            raise CapacityError(
                f"{batch.batch_size} requests and {batch.num_tokens} tokens to capture",
                accepted=f"at most {self.max_batch_size} and {self.max_num_tokens}, of init_cuda_graph_state",
            )
        like = step_of(batch)
        if like.spans is not None or like.encoder_slots is not None:
            raise BatchError(
                "spans, or encoder tokens to write, in a graph", accepted="decode, verify and draft steps without them"
            )
        size = batch.batch_size
        step = Step(
            batch_size=size,
            num_tokens=batch.num_tokens,
            max_query_len=batch.max_query_len,
            single=like.single,
            verify=like.verify,
            starts=self.starts[: size + 1],
            slots=self.slots[: batch.num_tokens],
            own=Keys(self.lengths[:size], self.pages[:size], self.pages.shape[1] * self.page_size, None),
            encoder=None if like.encoder is None else self._encoder(like.encoder),
            tree=None if like.tree is None else torch.empty_like(like.tree),
            depths=None
            if like.tree is None
            else torch.empty(like.tree.shape[:2], dtype=torch.int32, device=like.tree.device),
            captured=True,
        )
        captured = Captured(step, self._refresh(step, like, launchers))
        self._captured[form(batch)] = captured
        captured.fill(batch)
        return step

    def replay(self, batch: ForwardBatch) -> Step:
        """The captured step of the form of ``batch``, filled from it. Raises BatchError if there is none."""
        captured = self._captured.get(form(batch))
        if captured is None:
            raise BatchError(
                f"a replay of {batch.mode.name} with {batch.batch_size} requests and {batch.num_tokens} tokens, "
                "which was not captured",
                accepted=[f"{mode.name} {size} requests {tokens} tokens" for mode, size, tokens, _ in self._captured],
            )
        captured.fill(batch)
        return captured.step

    def _encoder(self, like: Keys) -> Keys:
        return Keys(
            torch.zeros_like(like.lengths), torch.zeros_like(like.pages), like.pages.shape[1] * self.page_size, None
        )

    def _refresh(self, step: Step, like: Step, launchers: Launchers) -> Bound:
        tree, encoder, none = step.tree, step.encoder, step.own.lengths
        q = 1 if tree is None else tree.shape[-1]
        constants = {
            "PAGE": self.page_size, "CHUNK": COPY_CHUNK, "TREE": tree is not None, "Q_TREE": q,
            "Q_PADDED": power_of_two_from(max(2, q)), "ENCODER": encoder is not None,
        }  # fmt: skip
        launcher = launchers.get(refresh_kernel, constants, {"num_warps": 1}, ())
        args = [
            like.own.lengths, step.own.lengths, like.starts, step.starts, like.own.pages, step.own.pages, like.slots,
            step.slots, *_pair(like.tree, tree, none), none if step.depths is None else step.depths,
            *_pair(_lengths(like.encoder), _lengths(encoder), none),
            *_pair(_pages(like.encoder), _pages(encoder), none),
            step.batch_size, step.num_tokens, 0, step.own.pages.stride(0), 0,
            0 if encoder is None else encoder.pages.stride(0),
        ]  # fmt: skip
        return Bound(launcher, args, moving=MOVING)


def form(batch: ForwardBatch) -> tuple[Any, int, int, int]:
    """What must be the same in a capture and its replays."""
    return batch.mode, batch.batch_size, batch.num_tokens, 0 if batch.tree is None else batch.tree.num_draft_tokens


def _pair(source: Tensor | None, buffer: Tensor | None, none: Tensor) -> tuple[Tensor, Tensor]:
    return (none, none) if source is None or buffer is None else (source, buffer)


def _lengths(keys: Keys | None) -> Tensor | None:
    return None if keys is None else keys.lengths


def _pages(keys: Keys | None) -> Tensor | None:
    return None if keys is None else keys.pages
