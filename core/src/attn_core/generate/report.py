"""What a run took and what ran it: as lines for people, and as JSON data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_core.generate.engine import STEP_NAMES, StepFigures
from attn_core.generate.request import Request
from attn_core.generate.session import Session

HEADER = ("step", "steps", "prompt tokens", "new tokens", "seconds", "tokens/s")


def lines(session: Session, requests: Sequence[Request], loaded: float, *, finished: bool) -> list[str]:
    """The figures at the end of a run; ``loaded``: seconds until the model was ready."""
    figures, config = session.engine.figures, session.queue.plan.config
    first = "none" if figures.first_token_seconds is None else f"{figures.first_token_seconds:.2f} s"
    stored = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    ran = ", ".join(f"{phase}: {' and '.join(names)}" for phase, names in session.witness.by_phase().items())
    said = [
        f"model  {session.queue.files.name}, {config.dtype} on {session.queue.place}",
        f"time   {loaded:.2f} s to load; first step to first token: {first}",
        *_table([HEADER, *(_row(STEP_NAMES[mode], of_mode) for mode, of_mode in figures.by_mode.items())]),
        f"cache  {figures.peak_pages} of {figures.num_pages} pages of {config.page_size} tokens in use at most "
        f"({config.kv_layout}, {stored}); {sum(r.num_reused for r in requests)} prompt tokens found in it",
        f"ran    {ran or 'nothing'}",
    ]
    if figures.guessed:
        said.append(f"guess  {figures.accepted} of {figures.guessed} guessed tokens were right")
    if preempted := sum(r.num_preemptions for r in requests):
        said.append(f"full   {preempted} times a request gave its pages back and was computed again; see --cache-mib")
    if not finished:
        left = sum(r.finish_reason is None for r in requests)
        said.append(f"interrupted: {left} of {len(requests)} prompts are unfinished; what they have is above")
    return said


def document(
    session: Session, requests: Sequence[Request], prompts: Sequence[str], loaded: float, *, finished: bool
) -> dict[str, Any]:
    """The texts and the figures as JSON data: seconds, tokens, tokens per second, pages."""
    figures, config = session.engine.figures, session.queue.plan.config
    return {
        "model": session.queue.files.name,
        "device": session.queue.place,
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "kv_layout": config.kv_layout,
        "page_size": config.page_size,
        "finished": finished,
        "ran": {phase: list(names) for phase, names in session.witness.by_phase().items()},
        "requests": [
            {
                "prompt": prompt,
                "text": session.queue.decode(request.generated),
                "tokens": request.generated,
                "prompt_tokens": request.num_prompt_tokens,
                "reused_tokens": request.num_reused,
                "preemptions": request.num_preemptions,
                "finish_reason": request.finish_reason,
            }
            for prompt, request in zip(prompts, requests, strict=True)
        ],
        "steps": {
            STEP_NAMES[mode]: {
                "steps": f.steps,
                "prompt_tokens": f.prompt_tokens,
                "new_tokens": f.new_tokens,
                "seconds": round(f.seconds, 6),
                "tokens_per_second": round(f.tokens_per_second, 3),
            }
            for mode, f in figures.by_mode.items()
        },
        "pages": {"peak": figures.peak_pages, "total": figures.num_pages},
        "guesses": {"made": figures.guessed, "right": figures.accepted},
        "load_seconds": round(loaded, 3),
        "first_token_seconds": figures.first_token_seconds and round(figures.first_token_seconds, 6),
    }


def _row(name: str, figures: StepFigures) -> tuple[str, ...]:
    counts = (figures.steps, figures.prompt_tokens, figures.new_tokens)
    return (name, *map(str, counts), f"{figures.seconds:.2f}", f"{figures.tokens_per_second:.1f}")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with the first column left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
