"""From logits to the next token: greedy, or drawn at a temperature from the nucleus, repeatable by a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request goes on and where it ends.

    ``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens that together reach that probability; ``seed``
    None draws anew every time. ``stop_ids``: tokens that end the request (they are not part of its text).
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}", accepted="an integer from 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}", accepted="0 (greedy), or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}", accepted="more than 0, up to 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}", accepted="an integer from 0 to 2**63 - 1")


class Sampler:
    """Draws the tokens of one request, from a stream of its own: what else is in the batch does not change them."""

    def __init__(self, params: SamplingParams, request_id: int = 0) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((params.seed + request_id) % 2**63)

    def choose(self, logits: Tensor) -> int:
        """The next token from ``logits`` [V], any float dtype and device."""
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float().cpu() / self.params.temperature, dim=-1)
        return int(torch.multinomial(nucleus(probabilities, self.params.top_p), 1, generator=self._generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``probabilities`` [V] with all but the nucleus set to 0: the fewest likeliest tokens whose sum reaches ``top_p``.

    Not normalised again. Holtzman et al. 2019, section 3.1.
    """
    if top_p == 1:
        return probabilities
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities)
    kept[tokens] = ordered.masked_fill(before >= top_p, 0.0)
    return kept
