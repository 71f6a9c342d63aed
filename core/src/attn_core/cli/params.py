"""What arguments are of, beyond click's own types: a completion script knows from them what to offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from attn_core.planning.config import DTYPES, KV_DTYPES

F = TypeVar("F", bound=Callable[..., Any])


class _Named(click.ParamType):
    """Text that planning checks, with a typed error of its own; the name tells completion what it is."""

    def __init__(self, name: str) -> None:
        self.name = name


BACKEND: Final = _Named("backend")
MODEL: Final = _Named("model")
SYSTEM: Final = _Named("system")

_BACKEND_OPTIONS: Final = (
    click.option("--attention-backend", type=BACKEND, metavar="NAME", help="Use this backend for every phase. [default: auto]"),
    click.option("--prefill-attention-backend", type=BACKEND, metavar="NAME", help="Use this one for prefill."),
    click.option("--decode-attention-backend", type=BACKEND, metavar="NAME", help="Use this one for decode."),
)
_SERVING_OPTIONS: Final = (
    click.option("--page-size", type=int, metavar="N", help="Tokens in a page of the cache. [default: the plan's choice]"),
    click.option("--kv-cache-dtype", metavar="DTYPE", help=f"One of {', '.join(KV_DTYPES)}."),
    click.option("--dtype", metavar="DTYPE", help=f"One of {', '.join(DTYPES)}. [default: the model's]"),
)


def backend_options(function: F) -> F:
    """The three options that name backends."""
    return _decorated(function, _BACKEND_OPTIONS)


def serving_options(function: F) -> F:
    """How the model is served: page size, cache dtype, dtype."""
    return _decorated(function, _SERVING_OPTIONS)


def chosen_backends(
    everywhere: str | None, prefill: str | None, decode: str | None
) -> str | dict[str, str]:
    """What the three options say, in the form that ``plan`` takes: one name, or a name for each phase."""
    if prefill is None and decode is None:
        return everywhere or "auto"
    chosen = {"prefill": prefill or everywhere or "auto", "decode": decode or everywhere or "auto"}
    return {**chosen, "verify": chosen["decode"], "draft": chosen["decode"]} if everywhere is None else {
        **chosen, "verify": everywhere, "draft": everywhere
    }


def _decorated(function: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
