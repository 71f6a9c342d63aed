"""attn-triton's kernels as gfx942 code in the emulator: launchers that compile for the chip, and a backend of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Final
from weakref import WeakValueDictionary

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
        code = _code(compiled.kernel)
        threads = 64 * compiled.metadata.num_warps
        names = [f"{self.name}: {name}" for name in self.kernel.arg_names]
        tensors = [i for i, arg in enumerate(args) if hasattr(arg, "data_ptr")]
        floats = {i for i, arg in enumerate(args) if isinstance(arg, float)}

        def run(x: int, y: int, stream: int, *values: Any) -> None:
            given: list[Argument] = [float(v) if i in floats else int(v) for i, v in enumerate(values[: len(args)])]
            for i, pointer in pointers({i: values[i] for i in tensors}, names).items():
                given[i] = pointer
            # two addresses of scratch that these kernels have none of
            given += [None, None]
            launch(code, (x, y, 1), (threads, 1, 1), given, wide=False, dynamic_lds=compiled.metadata.shared)

        return run


Emulated.launcher = _Launcher


@cache
def _code(blob: bytes) -> CodeObject:
    """Its instructions are made once for all variants that come out the same."""
    return CodeObject.parse(blob)


#: The tensors whose addresses were asked for, by address, as long as they live.
_ASKED: Final[WeakValueDictionary[int, Tensor]] = WeakValueDictionary()


@contextmanager
def addresses_heard() -> Iterator[None]:
    """Keeps in mind of which tensor each address is: the driver would be given the numbers alone."""
    ask = Tensor.data_ptr

    def heard(tensor: Tensor) -> int:
        address = ask(tensor)
        if address and tensor.device.type == "cpu":
            _ASKED[address] = tensor
        return address

    Tensor.data_ptr = heard  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.data_ptr = ask  # type: ignore[method-assign]


def pointers(addresses: Mapping[int, int], names: Sequence[str]) -> dict[int, Pointer | None]:
    """The tensors that addresses lie in, from there on, by argument."""
    found: dict[int, Pointer | None] = {i: None for i, address in addresses.items() if not address}
    for i, address in addresses.items():
        tensor = _ASKED.get(address)
        if tensor is not None and i not in found:
            found[i] = _from(tensor, address, names[i])
    if len(found) < len(addresses):
        # a tensor that was a moment's view, or was asked before this module listened
        for held in gc.get_objects():
            if type(held) is Tensor and held.device.type == "cpu":
                storage = held.untyped_storage()
                begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
                for i, address in addresses.items():
                    if begin <= address < end and i not in found:
                        found[i] = _from(held, address, names[i])
    for i in addresses.keys() - found.keys():
        raise AssertionError(f"{names[i]}: no tensor lies at {addresses[i]:#x}")
    return found


def _from(tensor: Tensor, address: int, name: str) -> Pointer:
    """All of the storage of ``tensor`` from ``address`` on."""
    storage = tensor.untyped_storage()
    first = address - storage.data_ptr()
    raw = torch.empty(0, dtype=torch.uint8)
    return Pointer(raw.set_(storage, first, (storage.nbytes() - first,)), name, writable=True)  # type: ignore[call-overload]


@cache
def _launchers() -> Emulated:
    """One for all backends: what one has compiled the others find."""
    return Emulated()


def forget_compiled() -> None:
    """The next backend compiles anew."""
    _launchers.cache_clear()


def on_gfx942() -> dict[str, Any]:
    """What a `TritonBackend` takes to be one on an MI300X in the emulator."""
    return {"chip": Chip(ARCH, *CHIPS[ARCH]), "launchers": _launchers()}


class TritonOnGfx942(TritonBackend):
    """The backend as it would be on an MI300X."""

    name: ClassVar[str] = "triton_gfx942"

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache, **on_gfx942())
