"""Launching code objects: through Wave's runtime on a ROCm machine, through a stand-in of it within an emulator."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from attn_core.errors import ConfigError, KernelError, PluginLoadError
from attn_core.planning.system import detect
from torch import Tensor

from attn_wave.compiler import Compiled
from attn_wave.shipped import ARCHITECTURES

#: What a kernel may write of what it is given.
WRITTEN: Final = ("results", "run_lse", "out", "lse")
#: What is found through tables, with any strides; all else is read as it lies.
STRIDED: Final = ("q", "k", "v")

#: The emulator that is entered: a module like wave_runtime, which also must be lent the tensors themselves.
emulated: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A loaded code object."""

    code: Compiled
    runtime: Any
    #: what the runtime made of it; it unloads what nobody holds
    binary: Any
    function: Any

    def launch(self, tensors: dict[str, Tensor], sizes: Sequence[int], grid: tuple[int, int]) -> None:
        """Run a grid of workgroups on ``tensors``, in the order of the kernel; ``sizes`` are those of its symbols.

        Tensors are passed by address: what is not contiguous is found through the tables.
        """
        assert all(t.is_contiguous() for name, t in tensors.items() if name not in STRIDED), "a table with strides"
        stream = 0 if self.runtime is emulated else torch.cuda.current_stream().cuda_stream
        # LDS is in the code object; the size here would be added to it
        info = self.runtime.KernelLaunchInfo(stream, self.function, 0, *grid, 1, *self.code.block, 0, 0, 0)
        addresses = self.runtime.Int64Vector([tensor.data_ptr() for tensor in tensors.values()])
        if self.runtime is emulated:
            emulated.lend(tensors, WRITTEN)
        with _hip_errors(self.code.name):
            self.runtime.launch(info, addresses, self.runtime.Int64Vector(list(sizes)), [])


def load(code: Compiled) -> Kernel:
    """Loads ``code`` on the current device. Raises PluginLoadError without Wave's runtime or HIP."""
    runtime = emulated if emulated is not None else _wave_runtime()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{code.name}.hsaco"
        path.write_bytes(code.blob)
        with _hip_errors(code.name):
            binary, function = runtime.load_binary(str(path), code.name)
    return Kernel(code, runtime, binary, function)


@contextmanager
def _hip_errors(name: str) -> Iterator[None]:
    """What HIP refuses, which Wave's runtime raises as RuntimeError, as KernelError."""
    try:
        yield
    except RuntimeError as error:
        raise KernelError(f"kernel {name}: {error}", hint="attn doctor shows the device and its driver") from error


@cache
def _wave_runtime() -> Any:
    try:
        import wave_runtime  # type: ignore[import-not-found]

        wave_runtime.load_hip_functions()
    except (ImportError, RuntimeError) as error:
        raise PluginLoadError(
            f"Wave's runtime cannot be used: {error}",
            accepted="wave-lang with its runtime, and ROCm's libamdhip64",
            hint="the loader must find them (LD_LIBRARY_PATH); attn verify wave --device emulated:gfx942 needs neither",
        ) from error
    return wave_runtime


def chip_of(device: torch.device) -> str:
    """gfx942 or its like: of the device, of the emulator, or of the system that is forced (to compile ahead).

    Raises PluginLoadError for a device that is no AMD GPU, ConfigError for a chip that kernels are not built for.
    """
    if emulated is not None:
        arch = str(emulated.arch)
    elif device.type == "cuda" and torch.version.hip is not None:
        arch = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    else:
        system = detect()
        if not (system.forced and system.device == "rocm"):
            raise PluginLoadError(
                f"the backend wave on {device}",
                accepted="an AMD GPU through torch's ROCm build, or an entered emulator",
                hint="attn warmup wave --arch gfx942 compiles for a chip that is not here",
            )
        arch = str(system.arch)
    if arch not in ARCHITECTURES:
        raise ConfigError(f"wave kernels for {arch}", given=arch, accepted=ARCHITECTURES)
    return arch
