"""The second phase: from the partial results of runs to outputs, joined by their log-sum-exp, sinks and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_wave.runtime import Kernel
from attn_wave.variant import UNIT

Once = Callable[[object, Callable[[], Any]], Any]
#: Workgroups that a grid may have in its second dimension.
MOST_ROWS: Final = 65535


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """What the first phase left: ``results`` [runs * rows, Dv] and ``lse`` [runs * rows] of base 2, both fp32.

    Rows are [Hkv, T, G]. Runs that were not computed have an lse of minus infinity.
    """

    results: Tensor
    lse: Tensor
    count: int
    tokens: int
    kv_heads: int
    group: int

    @property
    def rows(self) -> int:
        """Of one run."""
        return self.kv_heads * self.tokens * self.group

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the rows."""
        return self.kv_heads, self.tokens, self.group


def join(kernel: Kernel, runs: Runs, layer: AttentionLayer, into: Tensor, once: Once) -> tuple[Tensor, Tensor]:
    """Fills ``into`` [T, Hq, Dv], whose rows lie one after the other, and gives it and lse [T, Hq] fp32, natural.

    A row without keys has out 0, and lse minus infinity or its sink. ``once`` keeps what layers share in a step.
    """
    places = once(("places", runs.shape), lambda: _places(runs, into.device))
    sinks = _sinks(runs, layer.sinks, into.device, once)
    lse = into.new_empty(runs.tokens, layer.num_q_heads, dtype=torch.float32)
    for first in range(0, runs.rows, MOST_ROWS):
        tensors = {
            "results": runs.results[first:], "run_lse": runs.lse[first:], "places": places[first:],
            "sinks": sinks[first:], "out": into, "lse": lse,
        }  # fmt: skip
        kernel.launch(tensors, [runs.count, runs.rows], (1, min(MOST_ROWS, runs.rows - first)))
    return into, lse


def can_take(out: Tensor | None, like: Tensor) -> bool:
    """Whether the kernel can leave its result in ``out``: rows one after the other, from a multiple of 16 bytes on."""
    return (
        out is not None
        and out.dtype == like.dtype
        and out.is_contiguous()
        and out.data_ptr() % (UNIT * out.element_size()) == 0
    )


def _places(runs: Runs, device: torch.device) -> Tensor:
    """[rows] int32: the row of [T, Hq] that each row of [Hkv, T, G] is."""
    kv_heads, tokens, group = runs.shape
    token = torch.arange(tokens, dtype=torch.int32, device=device) * (kv_heads * group)
    head = torch.arange(kv_heads * group, dtype=torch.int32, device=device).view(kv_heads, 1, group)
    return (head + token[:, None]).flatten()


def _sinks(runs: Runs, sinks: Tensor | None, device: torch.device, once: Once) -> Tensor:
    """[rows] fp32, minus infinity where there is none."""
    if sinks is None:
        lowest = partial(torch.full, (runs.rows,), float("-inf"), dtype=torch.float32, device=device)
        none: Tensor = once(("no sinks", runs.rows), lowest)
        return none
    return sinks.float().view(runs.kv_heads, 1, runs.group).expand(runs.shape).flatten().contiguous()
