"""RequestPages: which pages each request of a batch holds, and which of its columns are tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attn_core.errors import BatchError, CacheFullError
from attn_core.runtime.batch import ForwardBatch, ForwardMode, page_table_of
from attn_core.runtime.kv_cache import PageAllocator


class RequestPages:
    """Columns are counted as transformers does, padding among them; pages hold tokens only.

    Requests may share pages (beams): one that is written to while another request holds it is copied first, by
    ``copy(from, to)``.
    """

    def __init__(self, num_pages: int, page_size: int, copy: Callable[[int, int], None]) -> None:
        self.page_size = page_size
        self.pages: list[list[int]] = []
        #: columns so far, padding among them
        self.columns = 0
        #: [B, columns] bool on the host; None where every column is a token, which costs least
        self.valid: Tensor | None = None
        self.allocator = PageAllocator(num_pages)
        self._copy = copy
        self._table: Tensor | None = None
        self._starts: tuple[Tensor, Tensor] | None = None
        self._coming: Decodes | None = None

    @property
    def in_use(self) -> int:
        """Pages that requests hold, a shared one counted once."""
        return self.allocator.num_pages - 1 - self.allocator.num_free

    def columns_after(self, batch_size: int, length: int, given: Tensor | None) -> Tensor | None:
        """[B, columns] after ``length`` more columns; None, here and in ``given``: every column is a token.

        Raises BatchError where it contradicts the columns that are cached.
        """
        if not self.columns:
            self.pages = self.pages or [[] for _ in range(batch_size)]
        if batch_size != len(self.pages):
            raise BatchError(f"{batch_size} requests over a cache of {len(self.pages)}", accepted="the same requests")
        if given is None and self.valid is None:
            return None
        total = self.columns + length
        before = torch.ones(batch_size, self.columns, dtype=torch.bool) if self.valid is None else self.valid
        valid = torch.ones(batch_size, total, dtype=torch.bool) if given is None else given
        if valid.shape != (batch_size, total) or not torch.equal(valid[:, : self.columns], before):
            raise BatchError(
                f"a mask of columns {tuple(valid.shape)} over {self.columns} cached and {length} new columns"
                " that differs from what was cached",
                accepted="the mask of the steps before, and the new columns after it",
            )
        return None if bool(valid.all()) else valid

    def seq_lens(self) -> list[int]:
        """The tokens of each request."""
        return [self.columns] * len(self.pages) if self.valid is None else self.valid.sum(1).tolist()

    def append(self, length: int, valid: Tensor | None) -> None:
        """``length`` columns more, with ``valid`` as columns_after gave it."""
        self.columns += length
        self.valid = valid

    def next_decode(self, batch_size: int, device: torch.device) -> ForwardBatch | None:
        """The batch of one more token a request, all of them as long; None before there are any, and with padding.

        Raises CacheFullError for more pages than there are.
        """
        if self.valid is not None or not self.columns or len(self.pages) != batch_size:
            return None
        coming, seq_len = self._coming, self.columns + 1
        if self._table is not None and coming is not None and coming.next_lens and coming.next_lens[0] == seq_len:
            return coming.take()
        seq_lens = [seq_len] * batch_size
        self.reserve(seq_lens, [1] * batch_size)
        return self.decode_batch(seq_lens, device)

    def decode_batch(self, seq_lens: Sequence[int], device: torch.device) -> ForwardBatch:
        """What ``ForwardBatch.build`` gives for one more token a request, of tables that are kept between steps."""
        if self._table is None:
            self._table = _table_of(self.pages, device)
            self._coming = None
        coming = self._coming
        if coming is None or coming.next_lens != seq_lens:
            if self._starts is None or self._starts[0].shape[0] != len(seq_lens) + 1:
                starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
                self._starts = starts, starts.to(device)
            coming = self._coming = Decodes(self.pages, seq_lens, self._starts, self._table, self.page_size)
        return coming.take()

    def reserve(self, seq_lens: Sequence[int], query_lens: Sequence[int]) -> None:
        """Pages for the new tokens of every request. Raises CacheFullError for more than there are."""
        for pages, seq_len, new in zip(self.pages, seq_lens, query_lens, strict=True):
            first = (seq_len - new) // self.page_size
            for i in range(first, len(pages) if new else first):
                if self.allocator.references(pages[i]) > 1:
                    pages[i] = self._copied(pages[i])
                    self._table = None
            missing = -(-seq_len // self.page_size) - len(pages)
            if missing > 0:
                pages += self.take(missing)
                self._table = None

    def take(self, count: int) -> list[int]:
        """``count`` pages. Raises CacheFullError."""
        try:
            return self.allocator.allocate(count)
        except CacheFullError as error:
            raise CacheFullError(
                f"the cache has room for {self.allocator.num_pages - 1} pages of {self.page_size} tokens, and all are"
                " in use",
                hint="PagedCache(max_seq_len=...), or let generate() make it",
            ) from error

    def _copied(self, page: int) -> int:
        (own,) = self.take(1)
        self._copy(page, own)
        self.allocator.release([page])
        return own

    def crop(self, count: int) -> None:
        """Forget the last ``count`` columns."""
        self.columns -= count
        self.valid = None if self.valid is None else self.valid[:, : self.columns]
        self._table = None
        for pages, seq_len in zip(self.pages, self.seq_lens(), strict=True):
            keep = -(-seq_len // self.page_size)
            self.allocator.release(pages[keep:])
            del pages[keep:]

    def select(self, chosen: Sequence[int]) -> None:
        """Keep the requests ``chosen``, in this order; one may be named twice."""
        self.pages = reordered(self.allocator, self.pages, chosen)
        self.valid = None if self.valid is None else self.valid[list(chosen)]
        self._table = None

    def reset(self) -> None:
        """Give everything back."""
        for pages in self.pages:
            self.allocator.release(pages)
        self.pages, self.columns, self.valid, self._table = [], 0, None, None

    def move(self, num_pages: int, others: Sequence[list[int]]) -> dict[int, int]:
        """Into a pool of ``num_pages``: the new id of every page in use; ``others`` are held beside the requests'."""
        allocator = PageAllocator(num_pages)
        moved: dict[int, int] = {}
        for pages in (*self.pages, *others):
            for i, page in enumerate(pages):
                if page in moved:
                    allocator.share([moved[page]])
                else:
                    (moved[page],) = allocator.allocate(1)
                pages[i] = moved[page]
        self.allocator = allocator
        self._table = None
        return moved


class Decodes:
    """The decode steps up to the first page that is filled: their lengths and slots, one row each, made at once.

    They are one batch, which each step finds changed: transformers has done with a step before it begins the next.
    """

    def __init__(
        self,
        pages: Sequence[Sequence[int]],
        seq_lens: Sequence[int],
        starts: tuple[Tensor, Tensor],
        table: Tensor,
        page_size: int,
    ) -> None:
        """``seq_lens`` after the first of these steps, whose tokens ``pages``, on the device ``table``, hold.

        ``starts`` are the query_start_loc on host and device.
        """
        device = starts[1].device
        last = [(n - 1) % page_size for n in seq_lens]
        slots = [row[(n - 1) // page_size] * page_size + i for row, n, i in zip(pages, seq_lens, last, strict=True)]
        count, steps = len(seq_lens), range(page_size - max(last))
        lens = torch.tensor([n + i for i in steps for n in seq_lens], dtype=torch.int32).view(-1, count)
        #: the lengths that the next step must have
        self.next_lens: list[int] | None = list(seq_lens)
        self._slots = torch.tensor([n + i for i in steps for n in slots], device=device).view(-1, count).unbind()
        self._lens_cpu = lens.unbind()
        self._lens = self._lens_cpu if device.type == "cpu" else lens.to(device).unbind()
        self._taken = 0
        self._batch = ForwardBatch(
            mode=ForwardMode.DECODE,
            seq_lens=self._lens[0],
            query_start_loc=starts[1],
            page_table=table,
            slot_mapping=self._slots[0],
            max_query_len=1,
            max_seq_len=max(seq_lens),
            seq_lens_cpu=self._lens_cpu[0],
            query_start_loc_cpu=starts[0],
        )

    def take(self) -> ForwardBatch:
        """The next step."""
        assert self.next_lens is not None
        batch, i = self._batch, self._taken
        if i:
            batch.seq_lens, batch.seq_lens_cpu, batch.slot_mapping = self._lens[i], self._lens_cpu[i], self._slots[i]
            batch.max_seq_len += 1
            batch.plan_state = None
        self._taken = i + 1
        self.next_lens = [n + 1 for n in self.next_lens] if i + 1 < len(self._slots) else None
        return batch


def _table_of(pages: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """``page_table_of``; rows of one length, as most are, at once."""
    if len({len(row) for row in pages}) == 1 and pages[0]:
        return torch.tensor(pages, dtype=torch.int32, device=device)
    return page_table_of(pages, device)


def reordered(allocator: PageAllocator, before: list[list[int]], chosen: Sequence[int]) -> list[list[int]]:
    """The pages of the requests ``chosen``, each with a reference more for every time that it is named."""
    after = [list(before[i]) for i in chosen]
    for pages in after:
        allocator.share(pages)
    for pages in before:
        allocator.release(pages)
    return after
