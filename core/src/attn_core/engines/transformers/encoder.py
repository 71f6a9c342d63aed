"""EncoderPages: the keys of cross layers in pages, written once, and the batches that say which token sees how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attn_core.engines.transformers.packing import Packing
from attn_core.engines.transformers.requests import RequestPages, reordered
from attn_core.errors import BatchError, ConfigError
from attn_core.generate.attention import PagedStep
from attn_core.runtime.batch import ForwardBatch, ForwardMode, slots_of


class EncoderPages:
    """The encoder keys of each request, in pages of the same pool as its tokens."""

    def __init__(self, requests: RequestPages) -> None:
        self._requests = requests
        self.pages: list[list[int]] = []
        self.length = 0
        self._unwritten = False
        self._batch: ForwardBatch | None = None

    def begin(self) -> None:
        """A pass begins: its cross layers need a batch of their own."""
        self._unwritten = False
        self._batch = None

    def accept(self, keys: Tensor) -> None:
        """A cross layer's keys [B, H, S, D] are about to be written. Raises BatchError for a second image later on."""
        if self._unwritten:
            return
        if self.pages:
            raise BatchError(
                "images in a later pass than the first", accepted="all images of a sequence with its first tokens"
            )
        self.length, self._unwritten = keys.shape[2], True
        count = -(-self.length // self._requests.page_size)
        self.pages = [self._requests.take(count) for _ in range(keys.shape[0])]

    def batch(self, step: PagedStep, packing: Packing, mask: Any) -> ForwardBatch:
        """The batch of this pass's cross layers; ``mask`` [B, 1, Q, S] is transformers', None where all is seen.

        A run of tokens that see the same keys is a request of its own: an image's tokens see its tiles, those before
        it, whose MLP the model switches off, see padding tiles too. Raises ConfigError for keys that are no prefix.
        """
        if self._batch is None:
            runs = self._runs(packing, mask)
            self._batch = self._of_runs(step.batch, runs)
            step.backend.init_forward_metadata(self._batch)
        return self._batch

    def _runs(self, packing: Packing, mask: Any) -> list[list[tuple[int, int]]]:
        """For each request (tokens, keys that they see), one after the other."""
        if mask is None:
            return [[(n, self.length)] if n else [] for n in packing.lens]
        seen = (mask[:, 0] == 0).cpu()
        counts = seen.sum(-1)
        if not torch.equal(seen, torch.arange(seen.shape[-1]) < counts[..., None]):
            raise ConfigError("tokens that see some of an image's tiles, and not the first ones")
        rows = packing.rows_of(counts)
        return [[(len(list(same)), int(n)) for n, same in groupby(row)] for row in rows]

    def _of_runs(self, step: ForwardBatch, runs: Sequence[Sequence[tuple[int, int]]]) -> ForwardBatch:
        assert step.seq_lens_cpu is not None
        whole = all(len(row) == 1 for row in runs)
        query_lens, seq_lens, pages, lens, encoder = [], [], [], [], []
        for b, row in enumerate(runs):
            end = int(step.seq_lens_cpu[b]) - sum(n for n, _ in row)
            for count, keys in row:
                end += count
                query_lens.append(count)
                seq_lens.append(end)
                pages.append(self._requests.pages[b])
                lens.append(keys)
                encoder.append(self.pages[b])
        batch = ForwardBatch.build(
            step.mode if whole else ForwardMode.EXTEND,
            query_lens=query_lens,
            seq_lens=seq_lens,
            pages=pages,
            page_size=self._requests.page_size,
            device=step.device,
            encoder_seq_lens=lens,
            encoder_pages=encoder,
        )
        if self._unwritten:
            size = self._requests.page_size
            slots = [slot for row in self.pages for slot in slots_of(row, range(self.length), size)]
            batch = replace(batch, encoder_slot_mapping=torch.tensor(slots, dtype=torch.int64, device=step.device))
        return batch

    def select(self, chosen: Sequence[int]) -> None:
        """Keep the requests ``chosen``, in this order; one may be named twice."""
        if self.pages:
            self.pages = reordered(self._requests.allocator, self.pages, chosen)

    def reset(self) -> None:
        """Give everything back."""
        for pages in self.pages:
            self._requests.allocator.release(pages)
        self.pages, self.length = [], 0
