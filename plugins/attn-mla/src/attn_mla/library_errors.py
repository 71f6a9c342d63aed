"""What the libraries raise, as an error of ours that keeps the cause."""

from __future__ import annotations

from attn_core.errors import KernelError
from attn_core.runtime.layer import AttentionLayer


def raised(error: Exception, library: str, layer: AttentionLayer, hint: str) -> KernelError:
    """A KernelError for what ``library`` raised in ``layer``; chain it with ``from error``."""
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return KernelError(f"{library}, layer {layer.layer_id}: {first_line}", hint=hint)
