"""A mode that repeats every call of a vendor operator on the wheel's Meta kernel, and compares shapes and dtypes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Calls compared in this process, by operator.
compared: Counter[str] = Counter()


class MetaKernels(TorchDispatchMode):
    """Operators without a Meta kernel pass unseen; `out` forms have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name.startswith(("npu::", "atb::")) and func._overloadname == "default" and _has_meta(name):
            wanted = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
            mine, theirs = [[_form(t) for t in tree_leaves(r) if isinstance(t, Tensor)] for r in (result, wanted)]
            assert mine == theirs, f"{name}: {mine}, and the wheel's Meta kernel says {theirs}"
            compared[name] += 1
        return result


def _has_meta(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"))


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
