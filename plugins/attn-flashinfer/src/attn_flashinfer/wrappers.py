"""FlashInfer's wrappers, which hold one plan each: made once, lent to a step, and never planned again too early."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

#: Bytes of the workspace that all wrappers of a device share: parts of split attention lie in it within one call.
WORKSPACE_BYTES: Final = 256 << 20


@cache
def workspace(device: torch.device) -> Tensor:
    """The float workspace of a device, zeroed, as the decode wrapper asks for its first use."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class PlannedWrapper:
    """One wrapper, and the moment from which it may be planned again.

    A plan is computed in page-locked memory and copied to the device without waiting. Planning again before that copy
    has run would overwrite its source, so a plan waits for the copy of the plan before, which has long been done
    unless the host is more than a step ahead.
    """

    __slots__ = ("_copied", "wrapper")

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._copied: torch.cuda.Event | None = None

    def plan(self, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """``call(*arguments, **options)``, which plans the wrapper, when it may."""
        if self._copied is not None and not self._copied.query():  # type: ignore[no-untyped-call]
            self._copied.synchronize()
        call(*arguments, **options)
        if self.wrapper.device.type == "cuda":
            if self._copied is None:
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()


class WrapperPool:
    """Wrappers that no step holds, by what they were made for."""

    def __init__(self) -> None:
        self._free: defaultdict[object, list[PlannedWrapper]] = defaultdict(list)

    def lend(self, key: object, make: Callable[[], Any], borrower: object) -> PlannedWrapper:
        """A wrapper made by ``make``, which comes back when ``borrower`` is gone."""
        free = self._free[key]
        wrapper = free.pop() if free else PlannedWrapper(make())
        weakref.finalize(borrower, free.append, wrapper)
        return wrapper
