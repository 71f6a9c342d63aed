"""Refusals of plans as an engine's user must read them: what to do next is said in the engine's own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attn_core.errors import BackendRefusedError


@contextmanager
def planned_by(option: str) -> Iterator[None]:
    """Where a backend that was named is refused, ``option`` is the way to one that can."""
    try:
        yield
    except BackendRefusedError as error:
        hint = f"{option} takes what can; attn explain MODEL shows what that is"
        raise BackendRefusedError(
            error.message, given=error.given, accepted=error.accepted, hint=hint, trace=error.trace
        ) from None
