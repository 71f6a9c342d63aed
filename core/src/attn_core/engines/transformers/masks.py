"""What a step's tokens may see, as transformers says it: padding, windows, blocks; explained exactly or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from attn_core.errors import ConfigError

Span = tuple[int, int]
#: for each request
Spans = list[list[Span]]


@dataclass(slots=True, eq=False)
class StepMask:
    """Which columns hold tokens, and the rule for what they see of each other.

    valid: [B, kv_length] bool on the host, None where every column holds a token. Columns count from ``kv_offset``.
    A rule that is neither causal, with a window or without, nor everything, is kept as ``dense`` [B, Q, kv_length].
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    valid: Tensor | None
    causal: bool = True
    window: int | None = None
    dense: Tensor | None = None
    _spans: dict[int | None, Spans] | None = None

    def check_window(self, window: int | None) -> None:
        """Raise ConfigError unless a layer with ``window`` may be given this mask."""
        if window != self.window and self.dense is None and self._reaching(self.window) != self._reaching(window):
            raise ConfigError(
                f"the mask has a window of {self.window}, the layer one of {window}",
                hint="the model's masks and its attention calls disagree; it cannot be served",
            )

    def spans(self, window: int | None) -> Spans | None:
        """For each request the spans of positions that see each other both ways; None if there are none.

        Positions count the tokens of a request, padding left out. Raises ConfigError for a rule that is not causality,
        a window on it and spans.
        """
        if self.dense is None:
            return None
        if self._spans is None:
            self._spans = {}
        if window not in self._spans:
            self._spans[window] = [self._explained(b, window) for b in range(self.batch_size)]
        found = self._spans[window]
        return found if any(found) else None

    def _reaching(self, window: int | None) -> int | None:
        """A window that no query of this step outgrows is none."""
        return None if window is not None and window >= self.kv_offset + self.kv_length else window

    def _explained(self, request: int, window: int | None) -> list[Span]:
        """The spans of one request, such that causality, the window and they give its mask, bit for bit."""
        assert self.dense is not None
        columns = torch.ones(self.kv_length, dtype=torch.bool) if self.valid is None else self.valid[request]
        rows = columns[-self.q_length :]
        seen = self.dense[request][rows][:, columns]
        keys = torch.arange(seen.shape[1])
        queries = keys[seen.shape[1] - seen.shape[0] :]
        ahead = seen & (keys[None, :] > queries[:, None])
        spans: list[Span] = []
        for row, query in enumerate(queries.tolist()):
            if bool(ahead[row].any()) and (not spans or query >= spans[-1][1]):
                spans.append((query, int(ahead[row].nonzero().max()) + 1))
        expected = keys[None, :] <= queries[:, None]
        for first, end in spans:
            inside = (queries >= first) & (queries < end)
            expected |= inside[:, None] & ((keys >= first) & (keys < end))[None, :]
        if window is not None:
            expected &= keys[None, :] > queries[:, None] - window
        if not torch.equal(expected, seen):
            raise ConfigError(
                "the model asks for a mask that is neither causal nor causal with spans of tokens that see each other",
                accepted="causality, sliding windows, bidirectional_spans, padding",
                hint="packed sequences, chunks and masks of your own are not in the contract",
            )
        return spans


def step_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_options: Any,
) -> Tensor | None:
    """What transformers calls for a mask of our implementations; ``attention_mask`` [B, columns] is True for tokens.

    Gives a [B, 1, Q, kv_length] tensor of one element that carries the StepMask (``mask_of``), so that it goes wherever
    masks go. What loses the attribute on its way is refused as a mask that nobody explains. None for one token a
    request that sees all before it, none of them padding.
    """
    valid = None if attention_mask is None else _valid(attention_mask, kv_length, kv_offset)
    rule = _rule(mask_function)
    if q_length == 1 and rule == "causal" and valid is None and q_offset + 1 == kv_offset + kv_length:
        return None
    mask = StepMask(batch_size, q_length, kv_length, int(q_offset), int(kv_offset), valid)
    if rule == "bidirectional":
        mask.causal = False
    elif isinstance(rule, int):
        mask.window = rule
    elif rule is None:
        assert mask_function is not None, "no function is the causal rule"
        dense: Any = masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=None,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        mask.dense = dense[:, 0].cpu()
    carrier = _one(torch.device(device)).expand(batch_size, 1, q_length, kv_length)
    carrier.attn_step_mask = mask  # type: ignore[attr-defined]
    return carrier


@cache
def _one(device: torch.device) -> Tensor:
    """The element of all carriers: each of them is a view of its own."""
    with torch.inference_mode(False):
        return torch.ones((), device=device)


def mask_of(attention_mask: Any) -> StepMask | None:
    """The StepMask that ``attention_mask`` carries, or None."""
    mask = getattr(attention_mask, "attn_step_mask", None)
    return mask if isinstance(mask, StepMask) else None


def _rule(function: Callable[..., Any] | None) -> str | int | None:
    """ "causal", "bidirectional", the window of a causal rule, or None for a rule that is none of them."""
    if function is None or function is masking_utils.causal_mask_function:
        return "causal"
    if function is masking_utils.bidirectional_mask_function:
        return "bidirectional"
    parts = _enclosed(function, "mask_functions")
    plain = masking_utils.sliding_window_causal_mask_function(1)
    if parts is None or getattr(function, "__code__", None) is not plain.__code__ or len(parts) != 2:
        return None
    overlay, causal = parts
    overlay_code = _enclosed(plain, "mask_functions")[0].__code__
    if causal is masking_utils.causal_mask_function and getattr(overlay, "__code__", None) is overlay_code:
        return int(_enclosed(overlay, "sliding_window"))
    return None


def _enclosed(function: Callable[..., Any], name: str) -> Any:
    """What a closure holds as ``name``, or None."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or name not in code.co_freevars:
        return None
    return cells[code.co_freevars.index(name)].cell_contents


def _valid(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor | None:
    """[B, kv_length] bool on the host; columns that the mask does not reach are padding, as transformers has it."""
    columns = attention_mask[:, kv_offset : kv_offset + kv_length].bool().cpu()
    if columns.shape[1] < kv_length:
        columns = torch.nn.functional.pad(columns, (0, kv_length - columns.shape[1]), value=False)
    return None if bool(columns.all()) else columns
