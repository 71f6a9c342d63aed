"""The continuous batch: which requests run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import deque

from attn_core.errors import CacheFullError, ConfigError, RequestTooLongError
from attn_core.generate.page_pool import PagePool
from attn_core.generate.prompt_lookup import guess
from attn_core.generate.request import Request, Step


class Scheduler:
    """First come, first served: decodes before prompts, long prompts in chunks, within a budget of tokens a step.

    A prompt is admitted when the pages of all of it are free; so only decodes can run out of pages, and then the
    request that was admitted last gives its own back and is computed again later (preemption). Every request fits into
    the cache alone, which is checked when it comes, so the oldest always gets on.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_requests: int,
        max_batch_tokens: int,
        max_context_len: int | None = None,
        num_draft_tokens: int = 0,
    ) -> None:
        """``num_draft_tokens``: tokens of a request that a verify step checks, its last one and guesses; 0 is off."""
        if num_draft_tokens == 1 or num_draft_tokens < 0:
            raise ConfigError(
                f"speculative_num_draft_tokens is {num_draft_tokens}",
                accepted="0 (off), or from 2: the last token and guesses",
            )
        if max_requests < 1:
            raise ConfigError(f"max_requests is {max_requests}", accepted="an integer from 1")
        if max_batch_tokens < max_requests:
            raise ConfigError(
                f"max_batch_tokens is {max_batch_tokens} with max_requests {max_requests}",
                accepted="at least one token for each request",
                hint="raise max_batch_tokens, or lower max_requests",
            )
        self.pool = pool
        self.max_requests = max_requests
        self.max_batch_tokens = max_batch_tokens
        self.max_context_len = max_context_len
        self.num_draft_tokens = num_draft_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raise RequestTooLongError or CacheFullError if the request could not be finished even if it were alone."""
        if not request.tokens:
            raise ConfigError(
                f"prompt {request.request_id + 1} has no token", accepted="a prompt of at least one token"
            )
        whole = len(request.tokens) + request.sampling.max_new_tokens
        asked = (
            f"prompt {request.request_id + 1}: {len(request.tokens)} tokens and {request.sampling.max_new_tokens} new"
        )
        if self.max_context_len is not None and whole > self.max_context_len:
            room = self.max_context_len - len(request.tokens)
            raise RequestTooLongError(
                f"{asked} are more than the model's context of {self.max_context_len}",
                given=whole,
                accepted=f"up to {self.max_context_len} tokens",
                hint=f"--max-new-tokens {room}" if room > 0 else "a shorter prompt",
            )
        # The last new token is never attended to, so it needs no place.
        if (needed := self.pool.pages_for(whole - 1)) > self.pool.num_pages:
            raise CacheFullError(
                f"{asked} need {needed} pages of {self.pool.page_size}; the cache has {self.pool.num_pages}",
                given=needed,
                accepted=f"up to {self.pool.num_pages * self.pool.page_size + 1} tokens",
                hint="a larger cache (--cache-mib), a shorter prompt, or fewer new tokens",
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises as ``check`` does."""
        self.check(request)
        self.waiting.append(request)

    def schedule(self) -> Step:
        """The next step, its pages reserved. Empty only when there is no work."""
        step = Step()
        preempted = self._schedule_decodes(step)
        self._schedule_chunks(step)
        if not preempted:
            self._admit(step)
        if self.num_draft_tokens and step.num_decodes == len(step.requests):
            self._draft(step)
        assert step.requests or not self.has_work, "work, but nothing can run"
        return step

    def finish_step(self, step: Step, sampled: dict[int, list[int]]) -> list[Request]:
        """Account for a step that ran; ``sampled`` has the new tokens by request id for each that it completed.

        In a verify step those are the accepted guesses and the token after them. Gives the requests that are finished
        now; their pages are given back.
        """
        finished = []
        for request, n in zip(step.requests, step.query_lens, strict=True):
            new = sampled.get(request.request_id, [])
            # Of a verify step's keys only those of the last token and of accepted guesses stay.
            request.num_computed += len(new) if step.drafts else n
            for token in new:
                self._append(request, token)
            # A stop token among the accepted guesses leaves keys behind it that belong to no token of the request.
            written = min(request.num_computed, len(request.tokens))
            self.pool.publish(request.tokens, request.pages, request.filled, written)
            if request.finish_reason is not None:
                self.running.remove(request)
                self._give_back(request)
                finished.append(request)
        return finished

    def abort(self) -> None:
        """Give back every page and forget every request: they keep what they generated."""
        for request in self.running:
            self._give_back(request)
        self.running.clear()
        self.waiting.clear()

    def _schedule_decodes(self, step: Step) -> bool:
        """Every request whose last token alone is uncomputed, oldest first. Tells whether one was preempted."""
        before = len(self.running)
        for request in list(self.running):
            if request.num_uncomputed == 1 and request in self.running and self._make_room(request):
                step.requests.append(request)
                step.query_lens.append(1)
        step.num_decodes = len(step.requests)
        return len(self.running) < before

    def _make_room(self, request: Request) -> bool:
        """A page for the next token, from whoever was admitted last if none is left; False if that is itself."""
        if self.pool.pages_for(len(request.tokens)) <= len(request.pages):
            return True
        while not self.pool.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.pages += self.pool.take(1)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_back(request)
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _schedule_chunks(self, step: Step) -> None:
        for request in self.running:
            if request.num_uncomputed > 1:
                self._add_chunk(step, request)

    def _admit(self, step: Step) -> None:
        while self.waiting and len(self.running) < self.max_requests and step.num_tokens < self.max_batch_tokens:
            request = self.waiting[0]
            # The last token is always computed: its logits are what comes next.
            request.filled = self.pool.match(request.tokens[:-1])
            request.pages = [filled.page for filled in request.filled]
            needed = self.pool.pages_for(len(request.tokens)) - len(request.pages)
            # A page to spare for each that runs, or the newcomer would be the next to be preempted.
            if needed + len(self.running) > self.pool.num_available:
                self._give_back(request)
                return
            request.pages += self.pool.take(needed)
            request.num_computed = len(request.filled) * self.pool.page_size
            if not request.num_preemptions:
                request.num_reused = request.num_computed
            self.waiting.popleft()
            self.running.append(request)
            self._add_chunk(step, request)

    def _add_chunk(self, step: Step, request: Request) -> None:
        n = min(request.num_uncomputed, self.max_batch_tokens - step.num_tokens)
        if not n:
            return
        step.requests.append(request)
        step.query_lens.append(n)
        if n > 1:
            # Prompts of one step may share already: a backend writes all keys before it attends. Chunks of one token
            # are left out, since they may run among the decodes, apart from the prompts.
            self.pool.publish(request.tokens, request.pages, request.filled, request.num_computed + n)

    def _draft(self, step: Step) -> None:
        """Make a step of decodes a verify step, if there is a guess for any request and room for guesses for all."""
        length, requests = self.num_draft_tokens, step.requests
        guesses = [guess(request.tokens, length - 1) for request in requests]
        ends = [len(request.tokens) + length - 1 for request in requests]
        missing = [max(0, self.pool.pages_for(e) - len(r.pages)) for r, e in zip(requests, ends, strict=True)]
        if (
            not any(guesses)
            or length * len(requests) > self.max_batch_tokens
            or sum(missing) > self.pool.num_available
            or (self.max_context_len is not None and max(ends) > self.max_context_len)
        ):
            return
        for request, count in zip(requests, missing, strict=True):
            request.pages += self.pool.take(count)
        # A request without a guess guesses its last token again: all have the same number.
        step.drafts = [g + [r.tokens[-1]] * (length - 1 - len(g)) for r, g in zip(requests, guesses, strict=True)]
        step.num_guesses = [len(g) for g in guesses]
        step.query_lens = [length] * len(requests)
        step.num_decodes = 0

    def _append(self, request: Request, token: int) -> None:
        """Add a sampled token, unless the request is finished or it is what finishes it."""
        if request.finish_reason is not None:
            return
        if token in request.sampling.stop_ids:
            request.finish_reason = "stop"
            return
        request.tokens.append(token)
        if len(request.generated) == request.sampling.max_new_tokens:
            request.finish_reason = "length"

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.filled, request.num_computed = [], [], 0
