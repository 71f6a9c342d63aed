"""Launching a compiled Triton kernel by addresses, past Triton's dispatch, which costs more than our kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import triton

#: The releases of Triton whose compiled launcher takes its arguments in the order that `launcher` gives them.
DIRECT_SERIES: Final = "3.6."


def launcher(kernel: Any) -> Callable[..., None]:
    """``launch(x, y, stream, *arguments)`` of a compiled kernel: addresses for tensors, constants last."""
    kernel._init_handles()
    run, function, packed = kernel.run, kernel.function, kernel.packed_metadata
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if triton.__version__.startswith(DIRECT_SERIES) and hasattr(run, "launch") and not scratch:
        launch, cooperative, pdl = run.launch, run.launch_cooperative_grid, run.launch_pdl

        def call(x: int, y: int, stream: int, *arguments: Any) -> None:
            launch(x, y, 1, stream, function, cooperative, pdl, None, None, packed, None, None, None, *arguments)

        return call
    return lambda x, y, stream, *arguments: run(x, y, 1, stream, function, packed, None, None, None, *arguments)


def current_stream(device: torch.device) -> int:
    """The current stream of a CUDA device, as the driver takes it."""
    return int(torch._C._cuda_getCurrentRawStream(device.index))
