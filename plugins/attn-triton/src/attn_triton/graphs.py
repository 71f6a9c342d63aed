"""The buffers that CUDA graphs share, and how a replay fills them."""

from __future__ import annotations

from attn_triton.workspace import Workspace


class GraphBuffers:
    """placeholder"""

    workspace: Workspace
