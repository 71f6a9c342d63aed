"""Graphs of the fake card: calls made during a capture are kept and not done, and a replay does them, in order.

The vendor's NPUGraph asks AscendCL to begin and end captures, task groups, updates and replays; acl.c tells of each. A
call in a task group is replaced when an update makes it again. A captured wait looks at its event's word when it is
replayed: where nobody recorded the event a card would wait for ever, and here that is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

Call = Callable[[], None]


class CaptureError(RuntimeError):
    """What a card refuses in a capture, or would wait for without end."""


class CapturedGraphs:
    """All graphs of this process. ``faults`` are what went wrong where only the vendor's C++ code could see it."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._graphs: dict[int, list[Call]] = {}
        self._groups: dict[int, list[Call]] = {}
        self._capture: list[Call] | None = None
        self._group: list[Call] | None = None
        self._update: tuple[int, list[Call]] | None = None
        # kept: a callback that is collected is a crash
        self._told = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64)(self._on)
        ctypes.CDLL("libascendcl.so").fake_listen(self._told)

    @property
    def capturing(self) -> bool:
        return self._capture is not None

    @property
    def keeping(self) -> bool:
        """Whether a call of the vendor's is kept and not done: in a capture, and in the update of a task."""
        return self.capturing or self._update is not None

    def keep(self, call: Call) -> None:
        """Into the task that is updated, else the open task group, else the graph."""
        if self._update is not None:
            self._update[1].append(call)
            return
        place = self._capture if self._group is None else self._group
        assert place is not None, "nothing is captured"
        place.append(call)

    def _on(self, what: bytes, where: int, value: int) -> None:
        try:
            getattr(self, f"_on_{what.decode()}")(where, value)
        except Exception as error:  # an exception cannot pass through the vendor's C++ code
            self.faults.append(f"{what.decode()}: {error}")

    def _on_capture_begin(self, where: int, _: int) -> None:
        self._capture = []

    def _on_capture_end(self, where: int, _: int) -> None:
        (made, self._capture), (open_group, self._group) = (self._capture, None), (self._group, None)
        assert made is not None, "an end of no capture"
        assert open_group is None, "a task group is still open"
        self._graphs[where] = made

    def _on_group_begin(self, where: int, _: int) -> None:
        assert self.capturing, "a task group outside of a capture"
        assert self._group is None, "a task group in a task group"
        self._group = []

    def _on_group_end(self, where: int, _: int) -> None:
        group, self._group = self._group, None
        assert group, "a task group without a call"
        assert self._capture is not None
        self._groups[where] = group
        self._capture.append(lambda: _do(group))

    def _on_update_begin(self, where: int, _: int) -> None:
        assert where in self._groups, "an update of no task group"
        assert self._update is None, "an update in an update"
        assert not self.capturing, "an update in a capture"
        self._update = where, []

    def _on_update_end(self, where: int, _: int) -> None:
        assert self._update is not None, "an end of no update"
        (handle, calls), self._update = self._update, None
        group = self._groups[handle]
        assert len(calls) == len(group), f"{len(calls)} calls in the update of {len(group)}"
        group[:] = calls

    def _on_wait(self, where: int, value: int) -> None:
        if self._capture is not None:
            self._capture.append(lambda: _wait(where, value))

    def _on_record(self, where: int, value: int) -> None:
        if self._capture is not None:
            self._capture.append(lambda: _write(where, value))

    _on_reset = _on_record

    def _on_replay(self, where: int, _: int) -> None:
        with torch.inference_mode():  # what was captured in it may be written to in it alone
            _do(self._graphs[where])


def _do(calls: list[Call]) -> None:
    for call in calls:
        call()


def _wait(word: int, value: int) -> None:
    held = ctypes.c_uint64.from_address(word).value
    if held != value:
        raise CaptureError("it waits for an event that nobody has recorded since the last replay: a card would hang")


def _write(word: int, value: int) -> None:
    ctypes.c_uint64.from_address(word).value = value
