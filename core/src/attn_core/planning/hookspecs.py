"""The hooks that a plugin may implement, for pluggy: `from attn_core import hookimpl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import pluggy

if TYPE_CHECKING:
    from attn_core.planning.config import AttentionConfig, Phase
    from attn_core.planning.hooks import DoctorCheck, FallbackEvent
    from attn_core.planning.system import System

hookspec: Final = pluggy.HookspecMarker("attn")
#: Marks the functions of a plugin that implement a hook.
hookimpl: Final = pluggy.HookimplMarker("attn")


@hookspec
def attn_rank(
    config: AttentionConfig, phase: Phase, system: System, candidates: tuple[str, ...]
) -> Sequence[str] | None:
    """The names of ``candidates`` (all can run the phase) that are to be preferred, best first; None for no opinion.

    Names left out follow in the order of the built-in table. The first plugin with an opinion decides.
    """
    return None


@hookspec
def attn_doctor_checks() -> Sequence[DoctorCheck]:
    """Checks that ``attn doctor`` reports beside its own."""
    return ()


@hookspec
def attn_fallback(event: FallbackEvent) -> None:
    """Called once for each phase of a plan that runs on a fallback backend."""
