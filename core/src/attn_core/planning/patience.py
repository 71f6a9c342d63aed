"""Whoever waits for a plugin is told for what; nothing is ended, since some libraries compile when they load."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Final

#: How long a plugin may take before it is said, in seconds.
PATIENCE_SECONDS: Final = 10.0


class SlowPluginWarning(UserWarning):
    """Plugin code takes long to load."""


@contextlib.contextmanager
def not_in_silence(who: str, what: str, dist: str) -> Iterator[None]:
    """Within this context a SlowPluginWarning tells what ``who`` of the distribution ``dist`` is still at."""
    timer = threading.Timer(PATIENCE_SECONDS, _say, (who, what, dist))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(who: str, what: str, dist: str) -> None:
    warnings.warn(
        f"{who}: {what} has taken {PATIENCE_SECONDS:g} s so far; Ctrl-C ends it, attn doctor loads it with a time"
        f" limit, ATTN_DISABLE={dist} leaves it out",
        SlowPluginWarning,
        stacklevel=1,
    )
