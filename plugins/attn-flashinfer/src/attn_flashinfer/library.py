"""The one place that imports flashinfer: the classes and functions we call, and its errors made ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

from attn_core.errors import KernelError, PluginLoadError

#: What the library's functions raise: its own checks, and those of its compiled modules.
RAISED: Final = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, KeyError)


@dataclass(frozen=True, slots=True)
class Library:
    """What we use of FlashInfer."""

    decode_wrapper: Any
    prefill_wrapper: Any
    ragged_wrapper: Any
    mla_wrapper: Any
    mla_metadata: Any


@cache
def load() -> Library:
    """The installed FlashInfer. Raises PluginLoadError if it cannot be imported or lacks what we call."""
    try:
        decode, prefill, mla = (import_module(f"flashinfer.{name}") for name in ("decode", "prefill", "mla"))
        return Library(
            decode_wrapper=decode.BatchDecodeWithPagedKVCacheWrapper,
            prefill_wrapper=prefill.BatchPrefillWithPagedKVCacheWrapper,
            ragged_wrapper=prefill.BatchPrefillWithRaggedKVCacheWrapper,
            mla_wrapper=mla.BatchMLAPagedAttentionWrapper,
            mla_metadata=mla.MLAPlanMetadata,
        )
    except (ImportError, OSError, AttributeError) as error:
        raise PluginLoadError(
            f"flashinfer cannot be used: {error}", hint="pip install 'flashinfer-python>=0.7.2,<0.8'"
        ) from error


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Whatever FlashInfer raises while it does ``what`` becomes a KernelError that keeps the cause."""
    try:
        yield
    except RAISED as error:
        raise raised(error, what) from error


def raised(error: Exception, what: str) -> KernelError:
    """A KernelError for what the library raised; chain it with ``from error``."""
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return KernelError(
        f"FlashInfer, {what}: {first_line}",
        hint="the cause is the library's own error; `attn verify flashinfer` shows whether this installation works",
    )
