"""Launching a compiled kernel with as little Python as Triton allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from attn_core.errors import KernelError
from torch import Tensor


def current_stream(device: torch.device) -> Callable[[], int]:
    """What gives the current stream of ``device`` as a number; a CPU has one, 0."""
    if device.type == "cpu":
        return int
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs ``kernel`` (TRITON_INTERPRET=1 when it was defined)."""
    return type(kernel).__name__ == "InterpretedFunction"


class Launcher:
    """One kernel with its constants and options: compiled when first needed, launched through the driver from then on.

    Triton's own dispatch looks at every argument of every launch, which costs more than short kernels run. A compiled
    kernel may assume that addresses, and numbers that are specialised, are multiples of 16: there is one for each
    pattern of that. The dtypes of the arguments must be the same in every call.
    """

    __slots__ = ("_variants", "constants", "interpreted", "kernel", "name", "options", "specialised", "stream", "tail")

    def __init__(
        self, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any], device: torch.device
    ) -> None:
        self.kernel = kernel
        self.name = kernel.__name__
        self.interpreted = interpreted(kernel)
        self.options = {} if self.interpreted else dict(options)
        #: the current stream of the device, as the driver takes it
        self.stream = current_stream(device)
        names = tuple(kernel.arg_names)
        self.constants = {name: constants[name] for name in names if name in constants}
        assert len(self.constants) == len(constants), f"{set(constants) - set(names)} are no parameters of {self.name}"
        self.tail = tuple(self.constants.values())
        leading = names[: -len(self.tail)]
        assert names[len(leading) :] == tuple(self.constants), (
            f"{self.name}: constants come last, and all of them are given"
        )
        fixed = set() if self.interpreted else {p.name for p in kernel.params if p.do_not_specialize}
        #: positions of the arguments whose divisibility by 16 a compiled kernel may rely on
        self.specialised = frozenset(i for i, name in enumerate(leading) if name not in fixed)
        self._variants: dict[frozenset[int], Any] = {}

    def compiled(self, args: Sequence[Any], odd: frozenset[int]) -> Any:
        """The kernel for arguments like these, of which those at ``odd`` are no multiples of 16. Raises KernelError."""
        found = self._variants.get(odd)
        if found is None:
            try:
                found = self.build(args, odd)
            except Exception as error:
                raise KernelError(
                    f"{self.name} does not compile or load here: {type(error).__name__}: {error}",
                    hint="report it with the layer's dimensions and the device; another backend may serve it",
                ) from error
            self._variants[odd] = found
        return found

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Any:
        """Compile for the current device, and load."""
        compiled = self.kernel.run(*args, **self.constants, **self.options, grid=(1,), warmup=True)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        compiled._init_handles()
        return compiled

    def odd(self, values: Sequence[Any]) -> frozenset[int]:
        """Positions of the specialised arguments that are no multiples of 16."""
        return frozenset(i for i in self.specialised if values[i] % 16)

    def __call__(self, grid: tuple[int, int], args: Sequence[Any]) -> None:
        """Launch a grid with tensors and numbers, on the current stream."""
        Bound(self, args).launch(*grid)


class Bound:
    """A launcher with its arguments. ``values`` are what the driver takes: replace entries named ``moving`` between
    launches.
    """

    __slots__ = ("_args", "_fast", "_launcher", "_moving", "_static_odd", "values")

    def __init__(self, launcher: Launcher, args: Sequence[Any], moving: tuple[int, ...] = ()) -> None:
        self._launcher = launcher
        self._args = list(args)
        self.values: list[Any] = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        self._moving = tuple(i for i in moving if i in launcher.specialised)
        self._static_odd = launcher.odd(self.values) - set(self._moving)
        self._fast: Any = None

    def put(self, position: int, tensor: Tensor) -> None:
        """Another tensor of the same dtype in a ``moving`` place."""
        self.values[position] = tensor.data_ptr()
        self._args[position] = tensor

    def set(self, position: int, number: float) -> None:
        """Another number in a place that is not specialised."""
        self.values[position] = self._args[position] = number

    def launch(self, x: int, y: int = 1) -> None:
        """Launch a grid (x, y) on the current stream."""
        launcher = self._launcher
        if not x:
            return
        if launcher.interpreted:
            launcher.kernel[(x, y)](*self._args, **launcher.constants)
            return
        values = self.values
        bits = 0
        for i in self._moving:
            bits |= values[i]
        compiled = self._fast
        if bits & 15 or compiled is None:
            odd = self._static_odd.union(i for i in self._moving if values[i] % 16)
            compiled = launcher.compiled(self._args, odd)
            if not bits & 15:
                self._fast = compiled
        stream = launcher.stream()
        compiled.run(
            x, y, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *launcher.tail
        )


class Launchers:
    """Launchers by kernel, constants, options and the dtypes of the arguments."""

    launcher: ClassVar[type[Launcher]] = Launcher

    def __init__(self, device: torch.device, *, dependent: bool) -> None:
        self._device = device
        #: whether kernels may begin while the one before them drains
        self.dependent = dependent
        self._found: dict[Any, Launcher] = {}

    def get(
        self, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any], dtypes: tuple[Any, ...]
    ) -> Launcher:
        """The launcher of a kernel that was asked for like this before, or a new one."""
        key = (kernel.__name__, tuple(sorted(constants.items())), tuple(sorted(options.items())), dtypes)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self.launcher(kernel, constants, options, self._device)
        return found
