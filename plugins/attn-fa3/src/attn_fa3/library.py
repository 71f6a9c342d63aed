"""The one place that touches ``flash_attn_interface``: two operators, checked by name, and its errors made ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

from attn_core.errors import KernelError, PluginLoadError
from torch import Tensor

#: The arguments of the forward operator that we name; a build whose operator lacks one is refused when it is loaded.
FORWARD_ARGUMENTS: Final = (
    "q", "k", "v", "q_v", "out", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k",
    "page_table", "leftpad_k", "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap",
    "scheduler_metadata", "num_splits", "q_descale", "k_descale", "v_descale",
)  # fmt: skip
#: Those of the operator that makes the tile schedule.
SCHEDULE_ARGUMENTS: Final = (
    "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "headdim_v", "qkv_dtype",
    "seqused_k", "cu_seqlens_q", "leftpad_k", "page_size", "is_causal", "window_size_left", "window_size_right",
    "has_softcap", "num_splits",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Library:
    """The operators of one installed FlashAttention 3.

    ``forward`` and ``schedule`` take the arguments named above, by keyword. They are the operators beneath the
    package's Python functions: those allocate the output, and cannot fill one that an engine owns.
    """

    forward: Callable[..., Sequence[Tensor]]
    schedule: Callable[..., Tensor]


@cache
def load() -> Library:
    """The installed library. Raises PluginLoadError if it cannot be imported or has other operators than we call."""
    try:
        interface = import_module("flash_attn_interface")
    except (ImportError, OSError) as error:
        raise PluginLoadError(
            f"flash_attn_interface cannot be imported: {error}",
            hint="pip install tokenspeed-fa3, for this Python and CUDA",
        ) from error
    operators = getattr(interface, "flash_attn_3_gpu", None)
    forward = getattr(operators, "fwd", None)
    schedule = getattr(operators, "get_scheduler_metadata", None)
    if forward is None or schedule is None:
        raise PluginLoadError(
            f"{interface.__file__} has no FlashAttention 3 operators",
            accepted="flash_attn_3.fwd and flash_attn_3.get_scheduler_metadata",
            hint="pip install tokenspeed-fa3",
        )
    _check("fwd", _argument_names(forward), FORWARD_ARGUMENTS)
    _check("get_scheduler_metadata", _argument_names(schedule), SCHEDULE_ARGUMENTS)
    return Library(forward=forward, schedule=schedule)


def raised(error: Exception, what: str) -> KernelError:
    """A KernelError for what the library raised while it did ``what``; chain it with ``from error``."""
    return KernelError(
        f"FlashAttention 3, {what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="the cause is the library's own error; `attn verify fa3` shows whether this installation works",
    )


def _argument_names(operator: Any) -> tuple[str, ...]:
    """The arguments of a torch operator (all its overloads have the same), or of a plain function."""
    overload = getattr(operator, "default", None)
    if overload is not None:
        return tuple(argument.name for argument in overload._schema.arguments)
    code = operator.__code__
    return tuple(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _check(name: str, have: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [argument for argument in wanted if argument not in have]
    if missing:
        raise PluginLoadError(
            f"the operator flash_attn_3.{name} has no argument {', '.join(missing)}",
            given=have,
            accepted=wanted,
            hint="install a version that the manifest of fa3 names",
        )
