"""Pages are shared by what they hold, kept while there is room, and given up when there is none."""

from __future__ import annotations

import pytest
from attn_core.errors import CacheFullError
from attn_core.generate.page_pool import FilledPage, PagePool
from hypothesis import given, settings
from hypothesis import strategies as st


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """The pages of a prompt that was computed whole."""
    run = pool.match(tokens)
    pages = [filled.page for filled in run]
    pages += pool.take(pool.pages_for(len(tokens)) - len(pages))
    pool.publish(tokens, pages, run, len(tokens))
    return pages


def test_prompts_that_begin_alike_share_the_full_pages_of_the_beginning() -> None:
    pool = PagePool(10, 2)
    first = fill(pool, [1, 2, 3, 4, 5])
    second = fill(pool, [1, 2, 3, 4, 6])
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert pool.num_in_use == 4


def test_the_same_tokens_after_another_beginning_are_not_shared() -> None:
    pool = PagePool(10, 2)
    fill(pool, [1, 2, 3, 4])
    assert pool.match([9, 9, 3, 4]) == []


def test_a_page_that_is_not_full_is_not_shared() -> None:
    pool = PagePool(10, 4)
    pages = pool.take(1)
    pool.publish([1, 2, 3, 4], pages, [], 3)
    assert pool.match([1, 2, 3, 4]) == []


def test_pages_of_a_finished_request_are_kept_for_the_next() -> None:
    pool = PagePool(10, 2)
    pages = fill(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.num_in_use == 0
    assert [filled.page for filled in pool.match([1, 2, 3, 4, 5])] == pages


def test_without_reuse_nothing_is_kept() -> None:
    pool = PagePool(10, 2, reuse=False)
    pool.release(fill(pool, [1, 2, 3, 4]))
    assert pool.match([1, 2, 3, 4]) == []
    assert pool.num_available == pool.num_pages == 9


def test_kept_pages_are_given_up_for_new_ones_longest_unused_first_and_ends_before_stems() -> None:
    pool = PagePool(5, 1)
    old = fill(pool, [1, 2])
    new = fill(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    assert pool.take(1) == [old[1]]
    assert [f.page for f in pool.match([1, 2])] == [old[0]]
    assert [f.page for f in pool.match([3, 4])] == new


def test_pages_in_use_are_never_given_up() -> None:
    pool = PagePool(4, 1)
    held = fill(pool, [1, 2])
    with pytest.raises(CacheFullError, match="2 pages wanted"):
        pool.take(2)
    assert pool.num_in_use == 2
    assert [f.page for f in pool.match([1, 2])] == held


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=7), st.integers(0, 3)), max_size=25))
def test_a_matched_page_always_holds_what_was_asked_for(prompts: list[tuple[list[int], int]]) -> None:
    """A model of the cache: what each page was last written with, by whom; a match must find exactly that."""
    pool = PagePool(8, 2)
    content: dict[int, tuple[int, ...]] = {}
    held: list[list[int]] = []
    for tokens, release in prompts:
        if release and held:
            pool.release(held.pop(release % len(held)))
        run: list[FilledPage] = pool.match(tokens)
        pages = [filled.page for filled in run]
        for i, page in enumerate(pages):
            assert content[page] == tuple(tokens[: 2 * (i + 1)])
        missing = pool.pages_for(len(tokens)) - len(pages)
        if missing > pool.num_available:
            pool.release(pages)
            continue
        for page in pool.take(missing):
            assert all(page not in other for other in held)
            pages.append(page)
        for i, page in enumerate(pages):
            content[page] = tuple(tokens[: 2 * (i + 1)])
        pool.publish(tokens, pages, run, len(tokens))
        held.append(pages)
        assert pool.num_in_use == len({page for pages in held for page in pages})
    for pages in held:
        pool.release(pages)
    assert pool.num_in_use == 0
    assert sorted(pool.take(pool.num_pages)) == list(range(1, 8))
