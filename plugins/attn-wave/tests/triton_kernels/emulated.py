"""attn-triton's kernels as gfx942 code in the emulator: launchers that compile for the chip, and a backend of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import triton
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.kv_cache import KVCache
from attn_triton.ahead import CHIPS, source_of, target
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.launch import Launcher, Launchers
from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.launch import Argument, Pointer, launch
from torch import Tensor

ARCH = "gfx942"


class Emulated(Launchers):
    """Launchers whose kernels run in the emulator, on CPU tensors."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), dependent=False)


class _Launcher(Launcher):
    __slots__ = ()

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Callable[..., None]:
        source = source_of(self.kernel, self, args, odd)
        compiled = triton.compile(source, target=target(ARCH), options=dict(self.options))
        code = CodeObject.parse(compiled.kernel)
        threads = 64 * compiled.metadata.num_warps
        addresses = [hasattr(arg, "data_ptr") for arg in args]
        floats = [isinstance(arg, float) for arg in args]

        def run(x: int, y: int, stream: int, *values: Any) -> None:
            given: list[Argument] = []
            for i, (is_address, value) in enumerate(zip(addresses, values, strict=False)):
                if is_address:
                    given.append(pointer(value, f"{self.name}: {self.kernel.arg_names[i]}") if value else None)
                else:
                    given.append(float(value) if floats[i] else int(value))
            # two addresses of scratch that these kernels have none of
            given += [None, None]
            launch(code, (x, y, 1), (threads, 1, 1), given, wide=False, dynamic_lds=compiled.metadata.shared)

        return run


Emulated.launcher = _Launcher


def pointer(address: int, name: str) -> Pointer:
    """The tensor that ``address`` lies in, from there on; the driver would be given the number alone."""
    for held in gc.get_objects():
        if type(held) is Tensor and held.device.type == "cpu":
            storage = held.untyped_storage()
            within = address - storage.data_ptr()
            if 0 <= within < storage.nbytes():
                raw = torch.empty(0, dtype=torch.uint8)
                return Pointer(raw.set_(storage, within, (storage.nbytes() - within,)), name, writable=True)  # type: ignore[call-overload]
    raise AssertionError(f"{name}: no tensor lies at {address:#x}")


class TritonOnGfx942(TritonBackend):
    """The backend as it would be on an MI300X."""

    name: ClassVar[str] = "triton_gfx942"

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache, chip=Chip(ARCH, *CHIPS[ARCH]), launchers=Emulated())
