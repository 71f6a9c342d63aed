"""FlashInfer's wrappers, which hold one plan each: made once, lent to a step, and never planned again too early."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

#: Bytes of the workspace that all wrappers of a device share: parts of split attention lie in it within one call.
WORKSPACE_BYTES: Final = 256 << 20
#: Steps that the host may be ahead of the device before it waits for the copy of a plan.
STEPS_AHEAD: Final = 4


@cache
def workspace(device: torch.device) -> Tensor:
    """The float workspace of a device, zeroed, as the decode wrapper asks for its first use."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class Copied:
    """Whether the device has copied from page-locked memory: overwriting it earlier would change what it copies."""

    __slots__ = ("_cuda", "_event")

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """All copies have been asked for, on the current stream."""
        if self._cuda:
            if self._event is None:
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def done(self) -> bool:
        """Whether they have run."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until they have run."""
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            self._event.synchronize()


class PlannedWrapper:
    """One wrapper of eager steps. A plan is computed in its page-locked memory and copied to the device later."""

    __slots__ = ("copied", "wrapper")

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.copied = Copied(wrapper.device)

    def plan(self, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """``call(*arguments, **options)``, which plans the wrapper, when the plan before has been copied."""
        self.copied.wait()
        call(*arguments, **options)
        self.copied.mark()


class WrapperPool:
    """Wrappers that no step holds, by what they were made for, the one that was planned first in front."""

    def __init__(self) -> None:
        self._free: defaultdict[object, deque[PlannedWrapper]] = defaultdict(deque)

    def lend(self, key: object, make: Callable[[], Any], borrower: object) -> PlannedWrapper:
        """A wrapper made by ``make``, which comes back when ``borrower`` is gone. One whose plan is still to be copied
        is lent only if there are many: to wait for it is to wait for the steps before.
        """
        free = self._free[key]
        ready = bool(free) and (free[0].copied.done() or len(free) >= STEPS_AHEAD)
        wrapper = free.popleft() if ready else PlannedWrapper(make())
        weakref.finalize(borrower, free.append, wrapper)
        return wrapper


class Staging:
    """Page-locked memory of one size and dtype, several pieces in turn, so that a step need not wait for the last."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._pieces = [torch.zeros(count, dtype=dtype, pin_memory=pinned) for _ in range(STEPS_AHEAD)]
        self._copied = [Copied(device) for _ in self._pieces]
        self._turn = 0

    def take(self) -> Tensor:
        """The piece that was taken longest ago, once the device has copied from it."""
        self._turn = (self._turn + 1) % len(self._pieces)
        self._copied[self._turn].wait()
        return self._pieces[self._turn]

    def mark_copied(self) -> None:
        """All copies from the piece have been asked for, on the current stream."""
        self._copied[self._turn].mark()
