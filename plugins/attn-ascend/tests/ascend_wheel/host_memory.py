"""torch on the fake card: its memory is host memory, so every aten operator runs on CPU tensors over the same bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from attn_ascend.emulator.library import _KERNELS
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_VIEWS = {
    "view", "as_strided", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "expand", "permute", "transpose",
    "t", "detach", "alias", "split", "split_with_sizes", "unbind", "narrow", "_reshape_alias", "unfold",
}  # fmt: skip
_libraries: list[Library] = []


def host(value: Any) -> Any:
    """A CPU tensor over the bytes of a tensor on the card; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type != "npu":
        return value
    storage = value.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(value.shape, dtype=value.dtype)
    raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.size(), value.stride(), value.storage_offset())


class HostMemory(TorchDispatchMode):
    """aten on host bytes; allocation and views stay torch-npu's own, and so do all operators of the vendor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if name == "_to_copy":
            return _to_copy(args[0], kwargs)
        if name == "copy_":
            host(args[0]).copy_(host(args[1]))
            return args[0]
        if namespace != "aten" or name in _ALLOCATES | _VIEWS:
            return func(*args, **kwargs)
        return _on_host(func, args, kwargs)


def _to_copy(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    device = torch.device(kwargs.get("device") or source.device)
    made = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=device)
    host(made).copy_(host(source))
    return made


def _on_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    aliases: dict[int, tuple[Tensor, Tensor]] = {}
    on_card = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "npu"

    def down(value: Any) -> Any:
        alias = host(value)
        if alias is not value:
            aliases[id(alias)] = (alias, value)
        return alias

    args, kwargs = tree_map(down, (args, kwargs))
    if not aliases and not on_card:
        return func(*args, **kwargs)
    if on_card:
        kwargs["device"] = torch.device("cpu")

    def up(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in aliases:
            return aliases[id(value)][1]
        made = torch.empty(value.shape, dtype=value.dtype, device="npu")
        host(made).copy_(value)
        return made

    return tree_map(up, func(*args, **kwargs))


def install_kernels() -> None:
    """The contract emulator's kernels in the place of the vendor's for the card, on host bytes."""
    for name, kernel in _KERNELS.items():
        namespace, _, rest = name.partition("::")
        library = Library(namespace, "IMPL")
        library.impl(rest, _on_bytes(kernel), "PrivateUse1", allow_override=True)
        _libraries.append(library)


def _on_bytes(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def on_card(*args: Any, **kwargs: Any) -> Any:
        result = kernel(*tree_map(host, args), **tree_map(host, kwargs))
        if "out" in kwargs:
            return tuple(kwargs["out"])
        return tree_map(_up, result)

    return on_card


def _up(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty(value.shape, dtype=value.dtype, device="npu")
    host(made).copy_(value)
    return made
