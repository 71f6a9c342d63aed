"""Triton's interpreter on a CPU as a device of the conformance kit: ``attn verify triton --device
emulated:triton-interpreter``.

What it proves is the logic of the kernels as Triton code, not what the compiler makes of it: no warps, no shared
memory, no tensor cores. Its arithmetic in bfloat16 and fp8 is not usable as shipped (truncating conversions, products
of the raw bits), so that conversions and dots are computed by torch here, with the rounding that the hardware has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from types import TracebackType
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from attn_core.errors import ConfigError
from attn_core.planning.system import System

ENVIRONMENT: Final = "TRITON_INTERPRET"
#: The architecture whose claims are tried: it has every feature.
ARCH: Final = "cuda:sm_90"


class TritonInterpreter:
    """The emulator of the entry point ``triton-interpreter``."""

    level = "contract-emulated"
    name = "Triton interpreter"

    def __init__(self) -> None:
        self._stack = ExitStack()

    def system(self) -> System:
        """A Hopper GPU, with the distributions that are here."""
        return System.parse(ARCH)

    def device(self) -> torch.device:
        return torch.device("cpu")

    def versions(self) -> Mapping[str, str]:
        return {"triton": metadata.version("triton"), "numpy": np.__version__}

    def __enter__(self) -> TritonInterpreter:
        """Raises ConfigError where the kernels were defined for a GPU already: the choice is made once a process."""
        if os.environ.get(ENVIRONMENT) != "1" and "attn_triton.kernels.tiles" in sys.modules:
            raise ConfigError("the kernels were imported for a GPU", hint=f"start the process with {ENVIRONMENT}=1")
        self._stack.enter_context(mock.patch.dict(os.environ, {ENVIRONMENT: "1"}))
        for patch in _patches():
            self._stack.enter_context(patch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _patches() -> list[Any]:
    """Conversions and dots of the interpreter, by torch."""
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32,
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
    }  # fmt: skip
    bits = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}

    def to_torch(data: Any, dtype: Any) -> torch.Tensor:
        """The numbers behind the interpreter's array, which holds bfloat16 and fp8 as raw bits."""
        raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).reshape(-1).copy())
        return raw.view(types[dtype]).reshape(data.shape)

    def from_torch(numbers: torch.Tensor, dtype: Any) -> Any:
        converted = numbers.to(types[dtype])
        torch_bits, numpy_bits = bits[converted.element_size()]
        return converted.view(torch_bits).numpy().view(numpy_bits)

    def convert(data: Any, source: Any, destination: Any, rounding: Any) -> Any:
        if source not in types or destination not in types:
            return original(data, source, destination, rounding)
        return from_torch(to_torch(data, source), destination).reshape(data.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        product = to_torch(a.data, a.dtype.scalar).float() @ to_torch(b.data, b.dtype.scalar).float()
        return interpreter.TensorHandle(product.numpy() + d.data, d.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """Triton 3.6 makes indices of arrays of one element in a way that numpy 2.4 refuses."""
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    original, original_patch = interpreter._convert_float, interpreter._patch_lang_tensor
    return [
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor),
        mock.patch.object(interpreter, "_convert_float", convert),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
    ]
