"""Kernels compiled for a chip that is not here, run by the machine on CPU tensors: what a backend takes for its
launchers.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import triton
from attn_triton.ahead import CHIPS, source_of, target
from attn_triton.chip import Chip
from attn_triton.launch import Launcher, Launchers, Pointer
from torch import Tensor

from ptx_machine.barriers import Boxes, descriptor
from ptx_machine.machine import Machine
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import parse
from ptx_machine.walking import MachineError


class MachineLaunchers(Launchers):
    """Launchers that compile for ``arch`` and run what came out. ``launched`` counts the launches of each kernel."""

    def __init__(self, arch: str = "sm_90", *, late: bool = False) -> None:
        self.chip = Chip(arch, *CHIPS[arch])
        super().__init__(torch.device("cpu"), dependent=self.chip.dependent_launch)
        self.late = late
        self.launched: Counter[str] = Counter()

    def get(self, kernel: Any, constants: Any, options: Any, dtypes: Any) -> Launcher:
        launcher = super().get(kernel, constants, options, dtypes)
        if not isinstance(launcher.kernel, Compiling):
            launcher.kernel = Compiling(self, launcher)
            launcher.interpreted = True  # it is given tensors and not addresses
        return launcher


class Compiling:
    """A kernel that is compiled when it is first launched with arguments of a kind."""

    def __init__(self, launchers: MachineLaunchers, launcher: Launcher) -> None:
        self._launchers, self._launcher, self._kernel = launchers, launcher, launcher.kernel
        self._machines: dict[frozenset[int], tuple[Machine, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self._launchers.launched[self._launcher.name] += 1
            values = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
            machine, metas = self._machine(args, values)
            memory = GlobalMemory(a for a in args if isinstance(a, Tensor))
            params, boxes = _expanded(values, metas)
            try:
                machine.run(grid, params, memory, boxes)
            except MachineError as fault:
                raise MachineError(f"{self._launcher.name} {dict(constants)}: {fault}") from fault

        return launch

    def _machine(self, args: tuple[Any, ...], values: list[Any]) -> tuple[Machine, list[Any]]:
        launcher = self._launcher
        odd = frozenset(i for i in launcher.specialised if values[i] % 16)
        found = self._machines.get(odd)
        if found is None:
            shapes = [Pointer(a.dtype, v) if isinstance(a, Tensor) else v for a, v in zip(args, values, strict=True)]
            source = source_of(self._kernel, launcher, shapes, odd)
            compiled = triton.compile(source, target=target(self._launchers.chip.arch), options=dict(launcher.options))
            program = parse(compiled.asm["ptx"], compiled.metadata.shared)
            metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
            found = self._machines[odd] = Machine(program, late=self._launchers.late), metas
        return found


def _expanded(values: list[Any], metas: list[Any]) -> tuple[list[int], list[Boxes]]:
    """The bits of all parameters: a descriptor is followed by its shape and strides; two places for scratch end
    them.
    """
    params: list[int] = []
    boxes: list[Boxes] = []
    for value in values:
        if hasattr(value, "block_shape"):
            params += [len(boxes), *value.shape, *value.strides]
            boxes.append(descriptor(value.base, metas[len(boxes)]))
        else:
            params.append(_bits(value))
    return [*params, 0, 0], boxes


def _bits(value: Any) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) if isinstance(value, float) else int(value)
