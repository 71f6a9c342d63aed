"""torch on the fake card: its memory is host memory, so every aten operator runs on CPU tensors over the same bytes.

As on a card: no operator takes fp64, and in a capture nothing is done, nothing is copied to or from the host, and the
host cannot wait. What a capture makes holds NaN until the first replay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from attn_ascend.emulator.library import _KERNELS
from captured_graphs import CapturedGraphs, CaptureError
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
_VIEWS = {
    "view", "as_strided", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "expand", "permute", "transpose",
    "t", "detach", "alias", "split", "split_with_sizes", "unbind", "narrow", "_reshape_alias", "unfold",
}  # fmt: skip
_libraries: list[Library] = []

graphs = CapturedGraphs()
#: What the host read of the card in this process, operator by operator: each is a wait for the card.
reads: list[str] = []


def host(value: Any) -> Any:
    """A CPU tensor over the bytes of a tensor on the card; anything else as it is."""
    if not _on_card(value):
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
            _copy(args[0], args[1])
            return args[0]
        if namespace != "aten" or name in _ALLOCATES | _VIEWS:
            return func(*args, **kwargs)
        return _on_host(func, args, kwargs)


def _on_card(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "npu"


def _to_copy(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    device = torch.device(kwargs.get("device") or source.device)
    made = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=device)
    _copy(made, source)
    return made


def _copy(target: Tensor, source: Tensor) -> None:
    there, here = host(target), host(source)
    if _on_card(source) and not _on_card(target):
        reads.append("copy")
    if not graphs.capturing or not (_on_card(target) or _on_card(source)):
        there.copy_(here)
        return
    if not (_on_card(target) and _on_card(source)):
        raise CaptureError("a copy between the host and the card in a capture")
    graphs.keep(lambda: _silently(there.copy_, here))


def _on_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    aliases: dict[int, tuple[Tensor, Tensor]] = {}
    makes = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "npu"

    def down(value: Any) -> Any:
        alias = host(value)
        if alias is not value:
            aliases[id(alias)] = (alias, value)
        return alias

    args, kwargs = tree_map(down, (args, kwargs))
    if not aliases and not makes:
        return func(*args, **kwargs)
    _refuse_fp64(func, [alias for alias, _ in aliases.values()])
    if makes:
        kwargs["device"] = torch.device("cpu")
    if graphs.capturing:
        return _captured(func, args, kwargs, aliases)

    def up(value: Any) -> Any:
        return aliases[id(value)][1] if id(value) in aliases else _up(value)

    result = func(*args, **kwargs)
    leaves = tree_leaves(result)
    _refuse_fp64(func, leaves)
    if any(not isinstance(leaf, Tensor) for leaf in leaves):
        reads.append(str(func))
    return tree_map(up, result)


def _captured(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], aliases: dict[int, Any]) -> Any:
    """The operator, kept for replays. One that writes in place gives what it writes to, any other a new tensor."""
    written = [value for value in _written(func._schema, args, kwargs) if id(value) in aliases]
    if written:
        graphs.keep(lambda: _silently(func, *args, **kwargs))
        return aliases[id(written[0])][1]
    result = func(*args, **kwargs)
    if any(not isinstance(value, Tensor) for value in tree_leaves(result)):
        raise CaptureError(f"{func}: the host waits for the card in a capture")
    return _kept(lambda: func(*args, **kwargs), result)


def _refuse_fp64(func: Any, tensors: Iterable[Any]) -> None:
    """op-plugin's documents name float16, float32 and bfloat16 for matrix products, and no fp64."""
    if any(isinstance(t, Tensor) and t.dtype is torch.float64 for t in tensors):
        raise RuntimeError(f"{func}: fp64 on the card")


@cache
def install_kernels() -> None:
    """The contract emulator's kernels in the place of the vendor's for the card, on host bytes; once in a process."""
    for name, kernel in _KERNELS.items():
        namespace, _, rest = name.partition("::")
        library = Library(namespace, "IMPL")
        library.impl(rest, _on_bytes(name, kernel), "PrivateUse1", allow_override=True)
        _libraries.append(library)


def _on_bytes(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    namespace, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    schema = getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")._schema

    def on_card(*args: Any, **kwargs: Any) -> Any:
        own, named = tree_map(host, (args, kwargs))
        if not graphs.keeping:
            result = kernel(*own, **named)
            return tuple(kwargs["out"]) if "out" in kwargs else tree_map(_up, result)
        written = [*_written(schema, own, named), *named.get("out", ())]
        result = _rehearsed(kernel, own, named, written)
        if written:
            graphs.keep(lambda: _silently(kernel, *own, **named))
            return tuple(kwargs["out"]) if "out" in kwargs else None
        return _kept(lambda: kernel(*own, **named), result)

    return on_card


def _rehearsed(kernel: Callable[..., Any], args: Any, named: Any, written: list[Tensor]) -> Any:
    """The call on copies of what it writes to: its rules are checked when it is captured, and nothing is done."""
    copies = {id(tensor): tensor.clone() for tensor in written}
    args, named = tree_map(lambda value: copies.get(id(value), value), (args, named))
    return kernel(*args, **named)


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the schema says are written to."""
    named = {argument.name: argument for argument in schema.arguments}
    given = [*zip(schema.arguments, args, strict=False), *((named[name], value) for name, value in kwargs.items())]
    return [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]


def _kept(call: Callable[[], Any], result: Any) -> Any:
    """New tensors on the card like ``result``, into which every replay puts what ``call`` gives then."""
    made = tree_map(_up, result)
    places = [host(tensor) for tensor in tree_leaves(made)]
    for place in places:
        place.fill_(float("nan") if place.is_floating_point() else 0)

    def again() -> None:
        for place, value in zip(places, tree_leaves(call()), strict=True):
            place.copy_(value)

    graphs.keep(again)
    return made


def _silently(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    call(*args, **kwargs)


def _up(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty(value.shape, dtype=value.dtype, device="npu")
    host(made).copy_(value)
    return made
