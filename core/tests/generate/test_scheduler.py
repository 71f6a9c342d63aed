"""The continuous batch: order, chunks, budget, admission, preemption, reuse, refusals; no model runs."""

from __future__ import annotations

import pytest
from attn_core.errors import CacheFullError, ConfigError, RequestTooLongError
from attn_core.generate.page_pool import PagePool
from attn_core.generate.request import Request, Step
from attn_core.generate.sampling import SamplingParams
from attn_core.generate.scheduler import Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st


def request(i: int, prompt: int | list[int], new: int = 4, stop: set[int] | None = None) -> Request:
    tokens = [1000 * (i + 1) + n for n in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return Request(i, tokens, SamplingParams(max_new_tokens=new, stop_ids=frozenset(stop or ())))


def scheduler(pages: int = 63, page_size: int = 4, slots: int = 8, budget: int = 16, **more: int) -> Scheduler:
    return Scheduler(PagePool(pages + 1, page_size), max_requests=slots, max_batch_tokens=budget, **more)


def next_token(tokens: list[int]) -> int:
    """What the stand-in for a model says next: depends on the tokens alone, as greedy decoding does."""
    return (tokens[-1] + sum(tokens[-3:]) // 50) % 5


def advance(s: Scheduler, step: Step) -> list[Request]:
    """Run the step on the stand-in: a token for each completed request, and those after right guesses."""
    new = {}
    for i, (r, completed) in enumerate(zip(step.requests, step.completes, strict=True)):
        assert step.tokens_of(i)[: r.num_uncomputed] == r.tokens[r.num_computed : r.num_computed + step.query_lens[i]]
        tokens, guesses = list(r.tokens), step.drafts[i] if step.drafts else []
        for guessed in [*guesses, None]:
            tokens.append(next_token(tokens))
            if tokens[-1] != guessed:
                break
        if completed:
            new[r.request_id] = tokens[len(r.tokens) :]
    return s.finish_step(step, new)


def shape(step: Step) -> list[tuple[int, int]]:
    return [(r.request_id, n) for r, n in zip(step.requests, step.query_lens, strict=True)]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    s = scheduler(budget=16)
    s.add(request(0, 40))
    chunks = []
    for _ in range(3):
        step = s.schedule()
        chunks.append((shape(step), step.completes))
        advance(s, step)
    assert chunks == [([(0, 16)], [False]), ([(0, 16)], [False]), ([(0, 8)], [True])]


def test_decodes_come_first_and_prompts_get_what_is_left_of_the_budget() -> None:
    s = scheduler(budget=16)
    s.add(request(0, 5))
    advance(s, s.schedule())
    s.add(request(1, 40))
    step = s.schedule()
    assert shape(step) == [(0, 1), (1, 15)]
    assert step.num_decodes == 1


def test_more_requests_than_slots_wait_for_one() -> None:
    s = scheduler(slots=2)
    for i in range(3):
        s.add(request(i, 3, new=2))
    order = []
    while s.has_work:
        step = s.schedule()
        order.append([i for i, _ in shape(step)])
        advance(s, step)
    assert order == [[0, 1], [0, 1], [2], [2]]


def test_a_stop_token_ends_a_request_and_is_not_part_of_it() -> None:
    s = scheduler()
    r = request(0, 3, stop={next_token(request(0, 3).tokens)})
    s.add(r)
    assert advance(s, s.schedule()) == [r]
    assert (r.finish_reason, r.generated) == ("stop", [])
    assert s.pool.num_in_use == 0


def test_max_new_tokens_ends_a_request() -> None:
    s = scheduler()
    r = request(0, 3, new=2)
    s.add(r)
    while s.has_work:
        advance(s, s.schedule())
    assert (r.finish_reason, len(r.generated)) == ("length", 2)


def test_prompts_of_one_step_share_their_beginning() -> None:
    s = scheduler(budget=64)
    common = list(range(1, 13))
    s.add(request(0, [*common, 50, 51]))
    s.add(request(1, [*common, 60]))
    step = s.schedule()
    assert shape(step) == [(0, 14), (1, 1)]
    first, second = step.requests
    assert first.pages[:3] == second.pages[:3]
    assert second.num_reused == 12


def test_the_last_token_of_a_prompt_is_computed_even_if_all_of_it_is_in_the_cache() -> None:
    s = scheduler(budget=64)
    s.add(request(0, [1, 2, 3, 4, 5, 6, 7, 8]))
    s.add(request(1, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert shape(s.schedule()) == [(0, 8), (1, 4)]


def test_a_page_that_a_decode_fills_is_not_shared_within_the_step() -> None:
    s = scheduler(budget=16, page_size=4)
    r = request(0, 3, new=8)
    s.add(r)
    advance(s, s.schedule())  # three tokens computed, the fourth is next
    s.add(Request(1, [*r.tokens, 7, 8]))
    assert shape(s.schedule()) == [(0, 1), (1, 6)]


def test_without_pages_for_it_a_prompt_waits() -> None:
    s = scheduler(pages=4, page_size=4)
    s.add(request(0, 9, new=2))
    s.add(request(1, 9, new=2))
    assert shape(s.schedule()) == [(0, 9)]
    assert [r.request_id for r in s.waiting] == [1]


def test_the_youngest_is_preempted_and_computed_again() -> None:
    s = scheduler(pages=8, page_size=2, budget=32)
    old, young = request(0, 6, new=8), request(1, 6, new=8)
    s.add(old)
    s.add(young)
    while s.has_work:
        advance(s, s.schedule())
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert young.num_reused == 0
    alone = request(1, 6, new=8)
    t = scheduler()
    t.add(alone)
    while t.has_work:
        advance(t, t.schedule())
    assert young.generated == alone.generated


@pytest.mark.parametrize(("prompt", "new", "hint"), [(90, 11, "--max-new-tokens 10"), (100, 1, "a shorter prompt")])
def test_longer_than_the_context_is_refused_before_anything_runs(prompt: int, new: int, hint: str) -> None:
    s = scheduler(max_context_len=100)
    with pytest.raises(RequestTooLongError, match=hint):
        s.add(request(0, prompt, new=new))
    assert not s.has_work


def test_what_can_never_fit_is_refused_before_anything_runs() -> None:
    s = scheduler(pages=4, page_size=4)
    with pytest.raises(CacheFullError, match="need 5 pages of 4; the cache has 4"):
        s.add(request(0, 10, new=8))
    s.add(request(1, 10, new=7))  # 16 tokens: the 17th is never attended to


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token"):
        scheduler().add(request(0, 0))


@pytest.mark.parametrize(("slots", "budget", "drafts"), [(0, 16, 0), (8, 4, 0), (8, 16, 1), (8, 16, -2)])
def test_impossible_limits_are_refused(slots: int, budget: int, drafts: int) -> None:
    with pytest.raises(ConfigError):
        scheduler(slots=slots, budget=budget, num_draft_tokens=drafts)


def decoding(tokens: list[int], **more: int) -> tuple[Scheduler, Request]:
    """A scheduler with one request whose prompt is computed but for its last token."""
    s = scheduler(num_draft_tokens=4, budget=32, **more)
    r = Request(0, tokens, SamplingParams(max_new_tokens=20))
    s.add(r)
    s.finish_step(s.schedule(), {0: [tokens[1]]})
    return s, r


def test_guesses_make_a_decode_a_verify_step() -> None:
    s, r = decoding([7, 8, 9, 5, 7])  # and 8: what followed "7 8" comes next
    step = s.schedule()
    assert (step.drafts, step.query_lens, step.num_decodes) == ([[9, 5, 7]], [4], 0)
    assert step.tokens_of(0) == [8, 9, 5, 7]
    s.finish_step(step, {0: [9, 5, 6]})
    assert r.generated == [8, 9, 5, 6]
    assert r.num_uncomputed == 1, "the keys of the wrong guess are not counted"


def test_a_request_without_a_guess_goes_along_and_none_at_all_is_a_decode() -> None:
    s, _ = decoding([7, 8, 9, 5, 7])
    s.add(request(1, 5))
    s.finish_step(s.schedule(), {0: [9], 1: [9999]})
    step = s.schedule()
    assert step.drafts == [[5, 7, 8], [9999, 9999, 9999]]
    assert step.num_guesses == [3, 0]
    lonely = scheduler(num_draft_tokens=4)
    lonely.add(request(0, 5))
    lonely.finish_step(lonely.schedule(), {0: [9999]})
    assert lonely.schedule().drafts == []


def test_prompts_come_before_guesses() -> None:
    s, _ = decoding([7, 8, 9, 5, 7])
    s.add(request(1, 5))
    step = s.schedule()
    assert (step.drafts, step.query_lens) == ([], [1, 5])


def test_a_stop_token_among_right_guesses_ends_the_request_there() -> None:
    s, r = decoding([7, 8, 9, 5, 7])
    r.sampling = SamplingParams(max_new_tokens=20, stop_ids=frozenset({5}))
    step = s.schedule()
    assert s.finish_step(step, {0: [9, 5]}) == [r]
    assert (r.generated, r.finish_reason) == ([8, 9], "stop")
    assert s.pool.num_in_use == 0


@pytest.mark.parametrize("limit", [{"max_context_len": 25}, {"pages": 7}])
def test_without_room_for_guesses_there_are_none(limit: dict[str, int]) -> None:
    s, r = decoding([7, 8, 9, 5, 7], **limit)
    while s.has_work:
        step = s.schedule()
        assert len(r.tokens) + 3 <= limit.get("max_context_len", 28) or not step.drafts
        s.finish_step(step, {0: [r.tokens[-4]]})
    assert len(r.generated) == 20


def test_abort_gives_back_every_page_and_keeps_what_was_generated() -> None:
    s = scheduler()
    r = request(0, 6)
    s.add(r)
    s.add(request(1, 6))
    advance(s, s.schedule())
    s.abort()
    assert not s.has_work
    assert s.pool.num_in_use == 0
    assert len(r.generated) == 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(5, 30),
    st.integers(1, 5),
    st.integers(8, 40),
    st.sampled_from([0, 0, 2, 4]),
)
def test_every_request_gets_what_it_would_get_alone(
    prompts: list[tuple[int, int, int]], slots: int, budget: int, page_size: int, pages: int, drafts: int
) -> None:
    """Whatever the limits: invariants hold in every step, everything ends, nobody's tokens depend on the others."""
    s = scheduler(pages=pages, page_size=page_size, slots=slots, budget=budget, num_draft_tokens=drafts)
    requests = []
    for i, (length, new, family) in enumerate(prompts):
        r = Request(i, [family * 100 + n for n in range(length)], SamplingParams(max_new_tokens=new))
        try:
            s.add(r)
        except CacheFullError:
            assert s.pool.pages_for(length + new - 1) > pages
            continue
        requests.append(r)
    steps = 0
    while s.has_work:
        step = s.schedule()
        check_step(s, step)
        advance(s, step)
        steps += 1
        assert steps < 2000
    assert s.pool.num_in_use == 0
    for r in requests:
        alone = Request(r.request_id, r.tokens[: r.num_prompt_tokens], r.sampling)
        while len(alone.generated) < r.sampling.max_new_tokens:
            alone.tokens.append(next_token(alone.tokens))
        assert (r.generated, r.finish_reason) == (alone.generated, "length")


def check_step(s: Scheduler, step: Step) -> None:
    assert 0 < step.num_tokens <= s.max_batch_tokens
    assert len(s.running) <= s.max_requests
    assert all(n == 1 for n in step.query_lens[: step.num_decodes])
    written: set[tuple[int, int]] = set()
    for r, n in zip(step.requests, step.query_lens, strict=True):
        assert len(r.pages) * s.pool.page_size >= r.num_computed + n
        slots = {
            (r.pages[p // s.pool.page_size], p % s.pool.page_size) for p in range(r.num_computed, r.num_computed + n)
        }
        assert not slots & written, "two requests write to one slot"
        written |= slots
