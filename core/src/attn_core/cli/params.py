"""What arguments are of, beyond click's own types: a completion script knows from them what to offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from attn_core.planning.config import DTYPES, KV_DTYPES, Phase

F = TypeVar("F", bound=Callable[..., Any])


class _Named(click.ParamType[Any]):
    """Text that planning checks, with a typed error of its own; the name tells completion what it is."""

    def __init__(self, name: str) -> None:
        self.name = name


BACKEND: Final = _Named("backend")
MODEL: Final = _Named("model")
SYSTEM: Final = _Named("system")

SYSTEMS: Final = "cpu, cuda:sm_90, cuda:sm_100, rocm:gfx942, npu:ascend910b"
FALLBACK_HELP: Final = (
    "When a named backend lacks a phase by design, what its manifest names runs: say so, refuse, or allow it."
)

_BACKEND_OPTIONS: Final = (
    click.option(
        "--attention-backend", type=BACKEND, metavar="NAME", help="Use this backend for every phase. [default: auto]"
    ),
    click.option("--prefill-attention-backend", type=BACKEND, metavar="NAME", help="Use this one for prefill."),
    click.option("--decode-attention-backend", type=BACKEND, metavar="NAME", help="Use this one for decode."),
)
_SERVING_OPTIONS: Final = (
    click.option(
        "--page-size", type=int, metavar="N", help="Tokens in a page of the cache. [default: the plan's choice]"
    ),
    click.option("--kv-cache-dtype", metavar="DTYPE", help=f"One of {', '.join(KV_DTYPES)}."),
    click.option("--dtype", metavar="DTYPE", help=f"One of {', '.join(DTYPES)}. [default: the model's]"),
)


def backend_options(function: F) -> F:
    """The three options that name backends."""
    return _decorated(function, _BACKEND_OPTIONS)


def serving_options(function: F) -> F:
    """How the model is served: page size, cache dtype, dtype."""
    return _decorated(function, _SERVING_OPTIONS)


def chosen_backends(everywhere: str | None, prefill: str | None, decode: str | None) -> dict[Phase, str]:
    """What the three options say, in the form that ``plan`` takes; phases that none of them names are ``auto``.

    Raises UsageError for a malformed ``prefill=a,decode=b`` in the first.
    """
    from attn_core.planning.plan import parse_backend

    chosen = parse_backend(everywhere or "auto")
    named: dict[Phase, str | None] = {"prefill": prefill, "decode": decode}
    return {**chosen, **{phase: name for phase, name in named.items() if name}}


def _decorated(function: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
