"""Triton's interpreter for the kernel tests of plugins: import it before kernels are defined.

It brings loops over what newer numpy no longer takes for an index.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

torch.set_num_threads(1)
_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, *scope: Any) -> None:
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patched
