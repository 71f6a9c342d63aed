"""The tables that FlashInfer's planners write, made again before each replay of a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from attn_core.errors import KernelError
from torch import Tensor

from attn_flashinfer.wrappers import Staging

#: Room for the tables of one plan; the library refuses a plan that needs more. Plans of MLA take 0.6 MB.
PLAN_BYTES: Final = 2 << 20


@dataclass(slots=True, eq=False)
class Replanned:
    """A planned wrapper of one captured batch size.

    made: what holds its workspaces, a paged wrapper or the planned backend of an MLA wrapper; call: the planner of its
    compiled module. query_starts [B + 1] int32 on the host; sizes: what that takes after the lengths, in its order.
    layout: where its tables lie and how many thread blocks its kernels have, which a captured graph keeps.
    """

    made: Any
    call: Callable[..., Any]
    query_starts: Tensor
    sizes: tuple[Any, ...]
    layout: Any = None


class PlanTables:
    """Plans captured wrappers past their own ``plan``: that would copy lengths and indices which lie in the graph's
    buffers already, and would overwrite page-locked memory that an earlier copy may still read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(PLAN_BYTES, torch.uint8, device)

    def workspace(self) -> Tensor:
        """A new integer workspace, where the tables of some wrapper lie on the device."""
        return torch.empty(PLAN_BYTES, dtype=torch.uint8, device=self._device)

    def plan(self, planned: Replanned, indptr: Tensor, lens: Tensor, *, first: bool) -> None:
        """Compute the tables for pages ``indptr`` [B + 1] and keys ``lens`` [B], int32 on the host, and have them
        copied to the device, without waiting.

        Only the ``first`` plan, before the capture, decides the layout. Raises KernelError if a later one comes out
        otherwise: the graph would read the wrong places.
        """
        made = planned.made
        found = planned.call(
            made._float_workspace_buffer, made._int_workspace_buffer, self._staging.take(), planned.query_starts,
            indptr, lens, *planned.sizes,
        )  # fmt: skip
        self._staging.mark_copied()
        if first:
            made._plan_info = planned.layout = found
        elif found != planned.layout:
            raise KernelError(
                "FlashInfer laid out its plan otherwise than at capture",
                given=list(found),
                accepted=list(planned.layout),
                hint="capture again",
            )
