"""What every engine's adapter asks of torch before it plans: the machine that tensors lie on, and names of dtypes."""

from __future__ import annotations

from functools import lru_cache

import torch

from attn_core.errors import ConfigError
from attn_core.generate.session import pick_device
from attn_core.planning.system import System

DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@lru_cache
def system_of(device: str) -> System:
    """The machine as the planner sees it, for tensors on torch's ``device``. Raises UsageError if it is not here."""
    return pick_device(device)[1]


def dtype_name(dtype: torch.dtype) -> str:
    """The planner's name of ``dtype``. Raises ConfigError for one that attention is not computed in."""
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"attention in {dtype}", given=str(dtype), accepted=", ".join(DTYPE_NAMES.values()))
    return DTYPE_NAMES[dtype]
