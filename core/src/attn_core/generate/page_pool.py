"""PagePool: the pages of the cache by what they hold, so that prompts that begin alike share those of the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_core.runtime.kv_cache import PageAllocator


@dataclass(frozen=True, slots=True, eq=False)
class FilledPage:
    """A full page that can be shared: its tokens, and the filled page that stands before it.

    Two pages hold the same keys and values if their tokens and everything before them are the same: keys carry their
    position, and deeper layers saw what came before.
    """

    page: int
    tokens: tuple[int, ...]
    previous: FilledPage | None


class PagePool:
    """Hands out pages, shares those that are filled, and keeps filled ones that nobody uses until room is needed.

    A page is in use (a request holds it), kept (filled, nobody holds it) or free. References are counted by the
    allocator; the pool itself holds one for each filled page.
    """

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = True) -> None:
        self.page_size = page_size
        self.reuse = reuse
        self._allocator = PageAllocator(num_pages)
        self._filled: dict[tuple[FilledPage | None, tuple[int, ...]], FilledPage] = {}
        self._by_page: dict[int, FilledPage] = {}
        # Least recently used first. A request's pages are given back last page first, so that of a beginning that
        # several share, the ends go before the stem.
        self._kept: dict[int, FilledPage] = {}

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out: all but the null page."""
        return self._allocator.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that ``take`` can give: the free and the kept ones."""
        return self._allocator.num_free + len(self._kept)

    @property
    def num_in_use(self) -> int:
        """Pages that requests hold, a shared one counted once."""
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold ``num_tokens``."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """``count`` pages to write to; kept ones are given up for it. Raises CacheFullError, and then takes none."""
        if count <= self.num_available:
            while self._allocator.num_free < count:
                self._forget(next(iter(self._kept)))
        return self._allocator.allocate(count)

    def match(self, tokens: Sequence[int]) -> list[FilledPage]:
        """The longest run of filled pages that hold the beginning of ``tokens``; the caller holds them from now on."""
        run: list[FilledPage] = []
        while self.reuse and (len(run) + 1) * self.page_size <= len(tokens):
            key = (run[-1] if run else None, self._tokens_of(tokens, len(run)))
            if key not in self._filled:
                break
            run.append(self._filled[key])
        for filled in run:
            self._kept.pop(filled.page, None)
        self._allocator.share(filled.page for filled in run)
        return run

    def publish(self, tokens: Sequence[int], pages: Sequence[int], run: list[FilledPage], num_written: int) -> None:
        """Offer the full pages of the first ``num_written`` tokens; ``run``, those offered so far, grows."""
        while self.reuse and (len(run) + 1) * self.page_size <= num_written:
            key = (run[-1] if run else None, self._tokens_of(tokens, len(run)))
            if key not in self._filled:
                filled = FilledPage(pages[len(run)], key[1], key[0])
                self._filled[key] = self._by_page[filled.page] = filled
                self._allocator.share([filled.page])
            run.append(self._filled[key])

    def release(self, pages: Sequence[int]) -> None:
        """Give back what a request held: filled pages that nobody else holds are kept, others are free."""
        for page in reversed(pages):
            self._allocator.release([page])
            if page in self._by_page and self._allocator.references(page) == 1:
                self._kept[page] = self._by_page[page]

    def _tokens_of(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.page_size : (index + 1) * self.page_size])

    def _forget(self, page: int) -> None:
        filled = self._kept.pop(page)
        del self._by_page[page]
        del self._filled[filled.previous, filled.tokens]
        self._allocator.release([page])
