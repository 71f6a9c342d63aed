"""The loop: schedule a step, build its batch, run the model, sample, account; until the work is done or stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from attn_core.generate.decode_graphs import DecodeGraphs
from attn_core.generate.model import PagedModel
from attn_core.generate.request import Request, Step
from attn_core.generate.sampling import Sampler
from attn_core.generate.scheduler import Scheduler
from attn_core.runtime.batch import ForwardBatch, ForwardMode

#: what a step of each mode is called in the figures at the end
STEP_NAMES: Final = {
    ForwardMode.EXTEND: "prefill",
    ForwardMode.DECODE: "decode",
    ForwardMode.MIXED: "mixed",
    ForwardMode.TARGET_VERIFY: "verify",
}
#: What a step brought: requests with their new tokens, a stop token too.
NewTokens = list[tuple[Request, list[int]]]


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
    """What a run took: by mode of step, the most pages in use at once, seconds until the first token, guesses made."""

    by_mode: dict[ForwardMode, StepFigures] = field(default_factory=dict)
    peak_pages: int = 0
    num_pages: int = 0
    first_token_seconds: float | None = None
    guessed: int = 0
    accepted: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens computed so far."""
        return sum(figures.prompt_tokens for figures in self.by_mode.values())


class Engine:
    """Runs the requests of a scheduler through a model, step by step; decodes as graphs if there are any."""

    def __init__(self, model: PagedModel, scheduler: Scheduler, graphs: DecodeGraphs | None = None) -> None:
        self.model = model
        self.scheduler = scheduler
        self.graphs = graphs
        self.figures = Figures(num_pages=scheduler.pool.num_pages)
        self._samplers: dict[int, Sampler] = {}
        self._began: float | None = None

    def run(
        self, on_step: Callable[[NewTokens], None] = lambda new: None, should_stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Step until there is no work; ``on_step`` gets what each step brought.

        ``should_stop`` is asked before each step; then every request keeps what it has. False if it was stopped.
        """
        while self.scheduler.has_work:
            if should_stop():
                self.scheduler.abort()
                return False
            on_step(self.step())
        return True

    def step(self) -> NewTokens:
        """One step: the requests that it brought tokens, and those tokens."""
        if self._began is None:
            self._began = time.perf_counter()
        step = self.scheduler.schedule()
        self.figures.peak_pages = max(self.figures.peak_pages, self.scheduler.pool.num_in_use)
        tokens, batch = build_batch(step, self.scheduler.pool.page_size, self.model.device)
        with self._timed(batch.mode, step):
            new = self._verify(step, tokens, batch) if step.drafts else self._advance(step, tokens, batch)
            self.figures.by_mode[batch.mode].new_tokens += sum(len(each) for _, each in new)
        if new and self.figures.first_token_seconds is None:
            self.figures.first_token_seconds = time.perf_counter() - self._began
        self.scheduler.finish_step(step, {request.request_id: each for request, each in new})
        return new

    def _advance(self, step: Step, tokens: Tensor, batch: ForwardBatch) -> NewTokens:
        """One more token for each request whose tokens are all computed by this step."""
        done = [i for i, completed in enumerate(step.completes) if completed]
        if batch.mode is ForwardMode.DECODE and self.graphs is not None:
            logits = self.graphs.forward(tokens, batch)[done]
        else:
            logits = self.model.forward(tokens, batch, logits_at=batch.query_start_loc[1:].long()[done] - 1)
        greedy = logits.argmax(-1).tolist()
        requests = [step.requests[i] for i in done]
        return [(r, [self._choose(r, logits[i], greedy[i])]) for i, r in enumerate(requests)]

    def _verify(self, step: Step, tokens: Tensor, batch: ForwardBatch) -> NewTokens:
        """For each request the guesses up to the first that is wrong, and the right token in its place.

        Each token is chosen from its own logits and compared with the guess, so that the tokens, or with a temperature
        their distribution, are what they would be one by one.
        """
        logits = self.model.forward(tokens, batch)
        logits = logits.view(len(step.requests), -1, logits.shape[-1])
        greedy = logits.argmax(-1).tolist()
        new: NewTokens = []
        for b, (request, drafts) in enumerate(zip(step.requests, step.drafts, strict=True)):
            chosen: list[int] = []
            for i, draft in enumerate([*drafts, None]):
                chosen.append(self._choose(request, logits[b, i], greedy[b][i]))
                if chosen[-1] != draft or chosen[-1] in request.sampling.stop_ids:
                    break
            self.figures.guessed += step.num_guesses[b]
            self.figures.accepted += min(len(chosen) - 1, step.num_guesses[b])
            room = request.sampling.max_new_tokens - len(request.generated)
            new.append((request, chosen[:room]))
        return new

    def _choose(self, request: Request, logits: Tensor, greedy: int) -> int:
        """The next token of ``request`` after ``logits`` [V], whose largest is at ``greedy``."""
        if request.sampling.temperature == 0:
            return greedy
        if request.request_id not in self._samplers:
            self._samplers[request.request_id] = Sampler(request.sampling, request.request_id)
        return self._samplers[request.request_id].choose(logits)

    @contextmanager
    def _timed(self, mode: ForwardMode, step: Step) -> Iterator[None]:
        figures = self.figures.by_mode.setdefault(mode, StepFigures())
        figures.steps += 1
        figures.prompt_tokens += sum(
            min(n, max(0, r.num_prompt_tokens - r.num_computed))
            for r, n in zip(step.requests, step.query_lens, strict=True)
        )
        began = time.perf_counter()
        yield
        figures.seconds += time.perf_counter() - began


def build_batch(step: Step, page_size: int, device: torch.device | str) -> tuple[Tensor, ForwardBatch]:
    """The tokens [T] int64 of a step and its batch, on ``device``."""
    tokens = [token for i in range(len(step.requests)) for token in step.tokens_of(i)]
    batch = ForwardBatch.build(
        mode_of(step),
        query_lens=step.query_lens,
        seq_lens=[r.num_computed + n for r, n in zip(step.requests, step.query_lens, strict=True)],
        pages=[request.pages for request in step.requests],
        page_size=page_size,
        device=device,
    )
    return torch.tensor(tokens, dtype=torch.int64, device=device), batch


def mode_of(step: Step) -> ForwardMode:
    """TARGET_VERIFY with guesses; DECODE if every request has one token, EXTEND if none in front has, else MIXED."""
    if step.drafts:
        return ForwardMode.TARGET_VERIFY
    if all(n == 1 for n in step.query_lens):
        return ForwardMode.DECODE
    return ForwardMode.MIXED if step.query_lens[0] == 1 else ForwardMode.EXTEND
