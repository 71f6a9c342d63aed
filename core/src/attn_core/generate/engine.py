"""The loop: schedule a step, build its batch, run the model, sample, account; until the work is done or stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from attn_core.generate.model import PagedModel
from attn_core.generate.sampling import Sampler
from attn_core.generate.scheduler import Request, Scheduler, Step
from attn_core.runtime.batch import ForwardBatch, ForwardMode

#: what a step of each mode is called in the figures at the end
STEP_NAMES: Final = {
    ForwardMode.EXTEND: "prefill",
    ForwardMode.DECODE: "decode",
    ForwardMode.MIXED: "mixed",
    ForwardMode.TARGET_VERIFY: "verify",
}
OnStep = Callable[[list[tuple[Request, int]]], None]


@dataclass(slots=True)
class StepFigures:
    """All steps of one mode: how many, prompt tokens computed, tokens generated, seconds of wall time."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.new_tokens) / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Figures:
    """What a run took: by mode of step, the most pages in use at once, seconds until the first token came out."""

    by_mode: dict[ForwardMode, StepFigures] = field(default_factory=dict)
    peak_pages: int = 0
    num_pages: int = 0
    first_token_seconds: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens computed so far."""
        return sum(figures.prompt_tokens for figures in self.by_mode.values())


class Engine:
    """Runs the requests of a scheduler through a model, one step after the other."""

    def __init__(self, model: PagedModel, scheduler: Scheduler) -> None:
        self.model = model
        self.scheduler = scheduler
        self.figures = Figures(num_pages=scheduler.pool.num_pages)
        self._samplers: dict[int, Sampler] = {}
        self._began: float | None = None

    def run(self, on_step: OnStep = lambda tokens: None, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Step until there is no work. ``on_step`` gets what each step brought: requests with their new token.

        ``should_stop`` is asked before each step; then every request keeps what it has. False if it was stopped.
        """
        while self.scheduler.has_work:
            if should_stop():
                self.scheduler.abort()
                return False
            on_step(self.step())
        return True

    def step(self) -> list[tuple[Request, int]]:
        """One step: the requests that it brought a token, and the token."""
        if self._began is None:
            self._began = time.perf_counter()
        step = self.scheduler.schedule()
        self.figures.peak_pages = max(self.figures.peak_pages, self.scheduler.pool.num_in_use)
        tokens, batch = build_batch(step, self.scheduler.pool.page_size, self.model.device)
        with self._timed(batch.mode, step):
            done = [i for i, completed in enumerate(step.completes) if completed]
            last_rows = batch.query_start_loc[1:].long()[done] - 1
            logits = self.model.forward(tokens, batch, logits_at=last_rows)
            requests = [step.requests[i] for i in done]
            chosen = self._sample(requests, logits) if done else []
        if chosen and self.figures.first_token_seconds is None:
            self.figures.first_token_seconds = time.perf_counter() - self._began
        self.scheduler.finish_step(step, {r.request_id: token for r, token in zip(requests, chosen, strict=True)})
        return list(zip(requests, chosen, strict=True))

    def _sample(self, requests: list[Request], logits: Tensor) -> list[int]:
        """A token for each of ``requests`` from ``logits`` [n, V]."""
        greedy: list[int] = logits.argmax(-1).tolist()
        return [
            greedy[i] if request.sampling.temperature == 0 else self._sampler(request).choose(logits[i])
            for i, request in enumerate(requests)
        ]

    def _sampler(self, request: Request) -> Sampler:
        if request.request_id not in self._samplers:
            self._samplers[request.request_id] = Sampler(request.sampling, request.request_id)
        return self._samplers[request.request_id]

    @contextmanager
    def _timed(self, mode: ForwardMode, step: Step) -> Iterator[None]:
        began = time.perf_counter()
        yield
        figures = self.figures.by_mode.setdefault(mode, StepFigures())
        figures.steps += 1
        figures.seconds += time.perf_counter() - began
        prompt = sum(
            min(n, max(0, r.num_prompt_tokens - r.num_computed))
            for r, n in zip(step.requests, step.query_lens, strict=True)
        )
        figures.prompt_tokens += prompt
        figures.new_tokens += sum(step.completes)


def build_batch(step: Step, page_size: int, device: torch.device | str) -> tuple[Tensor, ForwardBatch]:
    """The tokens [T] int64 of a step and its batch, on ``device``."""
    spans = [(r, r.num_computed, r.num_computed + n) for r, n in zip(step.requests, step.query_lens, strict=True)]
    tokens = [token for request, first, end in spans for token in request.tokens[first:end]]
    batch = ForwardBatch.build(
        mode_of(step),
        query_lens=step.query_lens,
        seq_lens=[end for _, _, end in spans],
        pages=[request.pages for request in step.requests],
        page_size=page_size,
        device=device,
    )
    return torch.tensor(tokens, dtype=torch.int64, device=device), batch


def mode_of(step: Step) -> ForwardMode:
    """DECODE if every request has one token, EXTEND if none in front has, else MIXED."""
    if all(n == 1 for n in step.query_lens):
        return ForwardMode.DECODE
    return ForwardMode.MIXED if step.query_lens[0] == 1 else ForwardMode.EXTEND
