"""How far a command is, on stderr: bars that go away for a person, one line for each thing done in a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from attn_core.cli.output import note


class Progress:
    """Called with what is being done, how much of it is done, and the total; a new name is a new thing.

    Bars are drawn by rich when stderr is a terminal, one at a time, and nothing of them stays on the screen.
    """

    def __init__(self) -> None:
        self._for_a_person = sys.stderr.isatty()
        self._what: str | None = None
        self._bars: Any = None
        self._task: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self._for_a_person:
            if what != self._what:
                note(f"attn: {what}")
            self._what = what
            return
        if what != self._what:
            self._begin(what)
        self._bars.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away: other things are written now."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = self._what = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.close()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task(what)
        self._bars.start()
        self._what = what
