"""The emulated device `ascend`: what the conformance kit plans and runs on when it is asked for ``emulated:ascend``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Final

import torch
from attn_core.planning.system import System
from torch.overrides import TorchFunctionMode

from attn_ascend import operators
from attn_ascend.emulator.library import install, vendored
from attn_ascend.emulator.rules import need

_LENGTHS: Final = ("actual_seq_qlen", "actual_seq_kvlen", "actual_seq_lengths", "actual_seq_lengths_kv")


class EmulatedAscend:
    """CPU tensors, and operators that check the vendor's contract. A context: within it the backend takes CPU caches.

    What passes here was accepted by rules written from documents, and computed by torch: no chip has seen it.
    """

    name: Final = "ascend"
    level: Final = "contract-emulated"

    def __init__(self) -> None:
        self._depth = 0
        self._modes: list[_WatchLengths] = []

    def device(self) -> torch.device:
        """Where caches and batches are put."""
        return torch.device("cpu")

    def system(self) -> System:
        """The machine that is stood in for, with what is installed here and the torch-npu that the schemas are from."""
        here = System(device="npu")
        dists = _With(here.dists, {"torch-npu": vendored()["torch_npu"]})
        return System(device="npu", arch="ascend910b", dists=dists, name="Ascend 910B, contract emulated on the CPU")

    def versions(self) -> dict[str, str]:
        """What the evidence is about: the wheel whose schemas stand here."""
        return {"torch-npu schemas": str(vendored()["torch_npu"])}

    def __enter__(self) -> EmulatedAscend:
        install()
        self._depth += 1
        operators.emulated = True
        mode = _WatchLengths()
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.pop().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._depth -= 1
        operators.emulated = self._depth > 0


class _WatchLengths(TorchFunctionMode):
    """Sees the arguments before torch's parser turns a tensor of lengths into a list, one device read an element."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for name in _LENGTHS:
            if name in kwargs:
                need(not isinstance(kwargs[name], torch.Tensor), "lengths_list", f"{name} is a tensor")
        return func(*args, **kwargs)


class _With(Mapping[str, str]):
    """Installed distributions and some more, still read lazily."""

    def __init__(self, base: Mapping[str, str], more: Mapping[str, str]) -> None:
        self._base, self._more = base, more

    def __getitem__(self, name: str) -> str:
        return self._more[name] if name in self._more else self._base[name]

    def __iter__(self) -> Any:
        return iter({*self._base, *self._more})

    def __len__(self) -> int:
        return len({*self._base, *self._more})


EMULATOR: Final = EmulatedAscend()
