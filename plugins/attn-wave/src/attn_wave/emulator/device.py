"""The emulated device `gfx942`: what the conformance kit plans and runs on when it is asked for ``emulated:gfx942``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from attn_core.planning.system import System
from torch import Tensor

from attn_wave import runtime
from attn_wave.compiler import WAVE_VERSION
from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.launch import Argument, Pointer, launch


@dataclass(frozen=True, slots=True)
class LaunchInfo:
    """The arguments of wave_runtime's KernelLaunchInfo, in its order."""

    stream: int
    function: CodeObject
    dynamic_lds: int
    grid_x: int
    grid_y: int
    grid_z: int
    block_x: int
    block_y: int
    block_z: int
    cluster_x: int
    cluster_y: int
    cluster_z: int


class EmulatedRuntime:
    """What the backend uses of the module wave_runtime, over the emulator.

    Tensors reach the real runtime as addresses alone; here they are lent before each launch, and an address that none
    of them has is refused.
    """

    KernelLaunchInfo: Final = LaunchInfo
    Int64Vector: Final = list

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.instructions = 0
        self.backwards = False
        self._objects: dict[bytes, CodeObject] = {}
        self._lent: dict[int, Pointer] = {}

    def load_binary(self, path: str, name: str) -> tuple[CodeObject, CodeObject]:
        """The code object at ``path``, twice: as what is loaded and as its function."""
        blob = Path(path).read_bytes()
        if blob not in self._objects:
            self._objects[blob] = CodeObject.parse(blob)
        code = self._objects[blob]
        if (code.name, code.arch) != (name, self.arch):
            raise EmulationError(f"kernel {code.name} for {code.arch}", accepted=f"{name} for {self.arch}")
        return code, code

    def lend(self, tensors: Mapping[str, Tensor], written: Sequence[str]) -> None:
        """The tensors of the next launch; only those named in ``written`` may be written."""
        self._lent = {t.data_ptr(): Pointer(t, name, name in written) for name, t in tensors.items()}

    def launch(self, info: LaunchInfo, addresses: Sequence[int], sizes: Sequence[int], scalars: Sequence[Any]) -> None:
        """Runs every workgroup to its end."""
        unknown = [hex(address) for address in addresses if address not in self._lent]
        if unknown or scalars or info.dynamic_lds:
            raise EmulationError(f"a launch with addresses {unknown}, scalars {scalars}, LDS {info.dynamic_lds}")
        grid, block = (info.grid_x, info.grid_y, info.grid_z), (info.block_x, info.block_y, info.block_z)
        arguments: list[Argument] = [*(self._lent[address] for address in addresses), *sizes]
        self.instructions += launch(info.function, grid, block, arguments, backwards=self.backwards)


class Gfx942:
    """An MI300X that runs machine code on the CPU: nothing about time, hazards or the chip's own rounding is proved."""

    name: Final = "gfx942"
    level: Final = "isa-emulated"

    def __init__(self) -> None:
        self.runtime = EmulatedRuntime(self.name)
        self._before: list[Any] = []

    def device(self) -> torch.device:
        """Where caches and batches are put."""
        return torch.device("cpu")

    def system(self) -> System:
        """The chip that is stood in for, with what is installed here and the compiler that the kernels are from."""
        here = System(device="rocm")
        dists = _With(here.dists, {"wave-lang": WAVE_VERSION})
        return System(device="rocm", arch=self.name, dists=dists, name="AMD gfx942, machine code emulated on the CPU")

    def versions(self) -> dict[str, str]:
        """What the evidence is about."""
        return {"kernels compiled by": f"wave-lang {WAVE_VERSION}"}

    def __enter__(self) -> Gfx942:
        self._before.append(runtime.emulated)
        runtime.emulated = self.runtime
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runtime.emulated = self._before.pop()


class _With(Mapping[str, str]):
    """Installed distributions and some more, still read lazily."""

    def __init__(self, base: Mapping[str, str], more: Mapping[str, str]) -> None:
        self._base, self._more = base, more

    def __getitem__(self, name: str) -> str:
        return self._more[name] if name in self._more else self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter({*self._base, *self._more})

    def __len__(self) -> int:
        return len({*self._base, *self._more})
