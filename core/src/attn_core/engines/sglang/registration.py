"""Our names in SGLang's registries, and what is made when one of them is chosen."""

from __future__ import annotations

import functools
from typing import Any, Final

from attn_core.engines.refusals import planned_by
from attn_core.planning.discovery import discover
from attn_core.planning.plan import AUTO

#: the attention backend that is planned
PLANNED: Final = "attn"


def backend_name(backend: str) -> str:
    """What SGLang calls ``backend`` (``auto``: the planned one)."""
    return PLANNED if backend == AUTO else f"{PLANNED}-{backend}"


def register_names() -> tuple[str, ...]:
    """Make ``attn`` and ``attn-NAME`` of every installed backend known to SGLang; gives those names."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    names = {backend_name(backend): backend for backend in (AUTO, *(ref.listed for ref in discover().backends))}
    for name, backend in names.items():
        register_attention_backend(name)(functools.partial(create, backend))
    for accepted, add in (
        (choices.ATTENTION_BACKEND_CHOICES, choices.add_attention_backend_choices),
        # who is deterministic is for the plan to say
        (choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES, choices.add_deterministic_attention_backend_choices),
    ):
        add([name for name in names if name not in accepted])
    return tuple(names)


def create(backend: str, runner: Any) -> Any:
    """The attention backend of SGLang's model runner ``runner``: what was planned, or every reason against it."""
    from attn_core.engines.sglang.backend import SGLangBackend
    from attn_core.engines.sglang.settings import check_speculation, speculative_settings

    check_speculation(runner, speculative_settings()[0])
    with planned_by(f"--attention-backend {PLANNED}"):
        return SGLangBackend(backend, runner)
