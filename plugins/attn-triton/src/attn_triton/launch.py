"""Launching a compiled kernel with as little Python as Triton allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
import triton
from attn_core.errors import KernelError
from torch import Tensor

#: The releases of Triton whose compiled launcher takes its arguments in the order that `direct` gives them.
DIRECT_SERIES: Final = "3.6."


def current_stream(device: torch.device) -> Callable[[], int]:
    """What gives the current stream of ``device`` as a number; a CPU has one, 0."""
    if device.type == "cpu":
        return int
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs ``kernel`` (TRITON_INTERPRET=1 when it was defined)."""
    return type(kernel).__name__ == "InterpretedFunction"


class Pointer:
    """An address that Triton takes for a tensor: all it asks of one is its dtype and its address."""

    __slots__ = ("_address", "dtype")

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address


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
        assert names[len(leading) :] == tuple(self.constants), f"{self.name}: constants come last, all of them given"
        fixed = set() if self.interpreted else {p.name for p in kernel.params if p.do_not_specialize}
        #: positions of the arguments whose divisibility by 16 a compiled kernel may rely on
        self.specialised = frozenset(i for i, name in enumerate(leading) if name not in fixed)
        self._variants: dict[frozenset[int], Callable[..., None]] = {}

    def compiled(self, args: Sequence[Any], values: Sequence[Any]) -> Callable[..., None]:
        """What launches the kernel for arguments like ``args``, whose addresses and numbers are ``values``, constants
        behind them.

        Raises KernelError with Triton's cause.
        """
        odd = frozenset(i for i in self.specialised if values[i] % 16)
        found = self._variants.get(odd)
        if found is None:
            now = [Pointer(a.dtype, v) if isinstance(a, Tensor) else v for a, v in zip(args, values, strict=False)]
            try:
                found = self._variants[odd] = self.build(now, odd)
            except Exception as error:
                raise KernelError(
                    f"{self.name} does not compile or load here: {type(error).__name__}: {error}",
                    hint="report it with the layer's dimensions and the device; another backend may serve it",
                ) from error
        return found

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Callable[..., None]:
        """Compile for the current device, and load."""
        kernel = self.kernel.run(*args, **self.constants, **self.options, grid=(1,), warmup=True)
        return direct(kernel.result() if hasattr(kernel, "result") else kernel)

    def __call__(self, grid: tuple[int, int], args: Sequence[Any]) -> None:
        """Launch a grid with tensors and numbers, on the current stream."""
        Bound(self, args).launch(*grid)


class Direct:
    """What the driver takes of a compiled kernel: ``launch(x, y, 1, stream, *head, *arguments)``, past the parts of
    Triton's launcher that it does not need.
    """

    __slots__ = ("head", "launch")

    def __init__(self, launch: Callable[..., None], head: tuple[Any, ...]) -> None:
        self.launch, self.head = launch, head

    def __call__(self, x: int, y: int, stream: int, *args: Any) -> None:
        self.launch(x, y, 1, stream, *self.head, *args)


def direct(kernel: Any) -> Direct:
    """What launches a compiled kernel."""
    kernel._init_handles()
    run, function, packed = kernel.run, kernel.function, kernel.packed_metadata
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if triton.__version__.startswith(DIRECT_SERIES) and hasattr(run, "launch") and not scratch:
        flags = (run.launch_cooperative_grid, run.launch_pdl)
        return Direct(run.launch, (function, *flags, None, None, packed, None, None, None))
    return Direct(run, (function, packed, None, None, None))


class Bound:
    """A launcher with its arguments. Those at ``moving`` are tensors that change from launch to launch, dtypes kept.

    ``values`` are what the driver takes, constants last; numbers that are not specialised may be replaced there. Where
    a microsecond counts addresses may, too, with ``aligned`` told whether all that move are multiples of 16; not in a
    launch that is ``interpreted``, which takes tensors (`place`).
    """

    __slots__ = ("_args", "_fast", "_head", "_launcher", "_moving", "aligned", "interpreted", "values")

    def __init__(self, launcher: Launcher, args: Sequence[Any], moving: tuple[int, ...] = ()) -> None:
        self._launcher = launcher
        self._args = list(args)
        self.values: list[Any] = [*(a.data_ptr() if isinstance(a, Tensor) else a for a in args), *launcher.tail]
        self._moving = moving
        self._fast: Callable[..., None] | None = None
        self._head: tuple[Any, ...] = ()
        self.interpreted = launcher.interpreted
        self.aligned = not any(self.values[i] % 16 for i in moving)

    def place(self, *tensors: Tensor | None) -> None:
        """The tensors of this launch in the ``moving`` places; None leaves a place that the kernel does not look at."""
        values, bits = self.values, 0
        for i, tensor in zip(self._moving, tensors, strict=True):
            if tensor is not None:
                values[i] = address = tensor.data_ptr()
                bits |= address
        self.aligned = not bits & 15
        if self.interpreted:
            for i, tensor in zip(self._moving, tensors, strict=True):
                self._args[i] = self._args[i] if tensor is None else tensor

    def launch(self, x: int, y: int = 1) -> None:
        """Launch a grid (x, y) on the current stream."""
        launcher, values = self._launcher, self.values
        if not x:
            return
        if self.interpreted:
            args = [a if isinstance(a, Tensor) else v for a, v in zip(self._args, values, strict=False)]
            launcher.kernel[(x, y)](*args, **launcher.constants)
            return
        fast = self._fast
        if fast is not None and self.aligned:
            fast(x, y, 1, launcher.stream(), *self._head, *values)
            return
        call = launcher.compiled(self._args, values)
        if self.aligned and isinstance(call, Direct):
            self._fast, self._head = call.launch, call.head
        call(x, y, launcher.stream(), *values)


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
