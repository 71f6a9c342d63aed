"""Importing a backend that was chosen: whatever its plugin does wrong becomes a PluginLoadError with the root cause."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TypeVar

from attn_core.errors import AttnError, PluginLoadError, ProtocolError
from attn_core.planning.discovery import BackendRef
from attn_core.planning.manifest import PROTOCOL_VERSION
from attn_core.planning.patience import not_in_silence
from attn_core.runtime.backend import AttentionBackend

Made = TypeVar("Made")


class PluginOutputWarning(UserWarning):
    """A plugin printed to stdout while it was loaded; what it printed went to stderr."""


def load_backend(ref: BackendRef) -> type[AttentionBackend]:
    """The class behind ``ref``; imports its plugin and nothing else.

    Raises ProtocolError, before any import, for a backend of another version of the contract; PluginLoadError if the
    import fails, exits, or does not give a subclass of AttentionBackend.
    """
    if not ref.manifest.speaks_protocol:
        raise ProtocolError(
            f"backend {ref.listed!r} was built for protocol {ref.manifest.protocol},"
            f" this attn-core speaks {PROTOCOL_VERSION}",
            given=ref.listed,
            accepted=f"a range that holds {PROTOCOL_VERSION}",
            hint="upgrade the older one of attn-core and the plugin",
        )
    cls = ref.cls if ref.cls is not None else call_plugin(ref, "importing it", lambda: _imported(ref))
    if not (isinstance(cls, type) and issubclass(cls, AttentionBackend)):
        raise PluginLoadError(
            f"backend {ref.listed!r}: {ref.object} is {cls!r}",
            given=ref.object,
            accepted="a subclass of attn_core.AttentionBackend",
            hint=f"correct the entry point of {ref.dist}",
        )
    return cls


def call_plugin(ref: BackendRef, what: str, call: Callable[[], Made]) -> Made:
    """``call()``, with the plugin's faults made typed: exceptions and exits become PluginLoadError, AttnErrors pass.

    What it prints goes to stderr, since stdout is data; it is warned of once, and so is a call that does not come back.
    """
    who = f"backend {ref.listed!r} ({ref.dist} {ref.version})"
    try:
        with _stdout_kept_clean(ref, what), not_in_silence(who, what, ref.dist):
            return call()
    except AttnError:
        raise
    except (Exception, SystemExit) as error:
        root = _root_cause(error)
        raise PluginLoadError(
            f"{who}: {what} failed: {_described(root)}",
            given=ref.listed,
            hint=_hint(ref, root),
        ) from error


def _imported(ref: BackendRef) -> object:
    module, _, path = ref.object.partition(":")
    found: object = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@contextlib.contextmanager
def _stdout_kept_clean(ref: BackendRef, what: str) -> Iterator[None]:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        text = printed.getvalue()
        if text.strip():
            sys.stderr.write(text if text.endswith("\n") else text + "\n")
            warnings.warn(
                f"backend {ref.listed!r} ({ref.dist}): {what} printed {len(text)} characters to stdout,"
                f" {text.strip().splitlines()[0]!r} first; they went to stderr",
                PluginOutputWarning,
                stacklevel=4,
            )


def _root_cause(error: BaseException) -> BaseException:
    """The exception that started it: along explicit causes, and contexts that were not suppressed."""
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None:
            return error
        error = earlier


def _described(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}"


def _hint(ref: BackendRef, error: BaseException) -> str:
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"install {error.name}, or leave the plugin out: ATTN_DISABLE={ref.dist}"
    if "undefined symbol" in text or "libtorch" in text or "libc10" in text:
        return (
            "its kernel library was built against another torch: reinstall it for this one (attn doctor shows more),"
            f" or leave the plugin out: ATTN_DISABLE={ref.dist}"
        )
    return f"attn doctor loads it on its own; ATTN_DISABLE={ref.dist} leaves it out"
