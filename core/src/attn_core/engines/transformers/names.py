"""The names under which backends are known to transformers, and back."""

from __future__ import annotations

from typing import Final

from attn_core.planning.plan import AUTO

#: the implementation whose backends are planned
PLANNED: Final = "attn"
#: what a user who named a backend that cannot may say instead
INSTEAD: Final = f'attn_implementation="{PLANNED}"'
_PREFIX: Final = "attn-"
#: transformers takes every name with "flash" in it for FlashAttention, and goes off to download that.
_TAKEN: Final = "flash"
_SPELLED: Final = "fla_sh"


def implementation_of(backend: str) -> str:
    """The attn_implementation of a backend (``auto``: the planned one)."""
    return PLANNED if backend == AUTO else f"{_PREFIX}{backend}"


def key_of(implementation: str) -> str:
    """What transformers is told for ``implementation``: itself, but never a name that it would take for another."""
    return implementation.replace(_TAKEN, _SPELLED) if implementation.startswith(_PREFIX) else implementation


def backend_of(key: str | None) -> str | None:
    """What ``plan`` is asked for by a model of that attn_implementation; None if it is not ours."""
    if key == PLANNED:
        return AUTO
    return key.removeprefix(_PREFIX).replace(_SPELLED, _TAKEN) if key and key.startswith(_PREFIX) else None
