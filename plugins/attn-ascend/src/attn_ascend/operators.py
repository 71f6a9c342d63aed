"""Which of the vendor's operators this machine has, and the one place where they are called from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from attn_core.errors import KernelError, PluginLoadError
from torch import Tensor

#: Oldest torch-npu that can stand beside the oldest torch of attn-core.
MINIMUM_TORCH_NPU: Final = "2.9"

_FUSED_V2: Final = "npu_fused_infer_attention_score_v2"
_FUSED_V1: Final = "npu_fused_infer_attention_score"
#: Version 2 is version 1 with other names, and sinks. What they share is written in the names of version 2.
_V1_NAMES: Final = {
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "return_softmax_lse": "softmax_lse_flag",
}

#: Set by the contract emulator while it stands in for the chip: CPU tensors are then taken.
emulated: bool = False


@dataclass(frozen=True, slots=True)
class Operators:
    """The vendor's operators that are here, by what they do; a missing one is refused or gone around.

    fused: the newest fused infer attention operator (2 from op-plugin 7.2, 1 since 6.0), 0 where there is none.
    paged, paged_latent, write, write_latent: ATB's operators, which need the NNAL package.
    scatter: aclnn's cache write, where it can be told that the cache is ND (since torch-npu 2.10).
    """

    fused: int
    paged: bool
    paged_latent: bool
    write: bool
    write_latent: bool
    scatter: bool

    @classmethod
    def here(cls) -> Operators:
        """What is registered now; ``load`` makes sure that everything installed is."""
        return cls(
            fused=2 if _has("npu", _FUSED_V2) else int(_has("npu", _FUSED_V1)),
            paged=_has("atb", "_npu_paged_attention"),
            paged_latent=_has("atb", "_npu_paged_attention_mla"),
            write=_has("atb", "_npu_reshape_and_cache"),
            write_latent=_has("atb", "_npu_reshape_and_cache_siso"),
            scatter=_has("npu", "npu_scatter_pa_kv_cache", "cache_mode"),
        )

    @property
    def takes_sinks(self) -> bool:
        """Whether the fused operator has a sink of its own."""
        return self.fused == 2

    def fused_attention(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        """(out, lse) of the fused operator; arguments in the names of version 2."""
        result: tuple[Tensor, Tensor] = _call("npu", self._fused_name, query, key, value, **self._named(arguments))
        return result

    def fused_attention_out(
        self, query: Tensor, key: Tensor, value: Tensor, *, workspace: Tensor, out: Sequence[Tensor], **arguments: Any
    ) -> None:
        """The form that graphs capture: it fills ``out`` (attention, LSE placeholder) and allocates nothing."""
        _call("npu", self._fused_name, query, key, value, overload="out", workspace=workspace, out=list(out),
              **self._named(arguments))  # fmt: skip

    def fused_workspace(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        """A buffer that is large enough for any lengths of this call."""
        name = f"_{self._fused_name}_get_max_workspace"
        result: Tensor = _call("npu", name, query, key, value, **self._named(arguments))
        return result

    def paged_attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, table: Tensor, lengths: Tensor, out: Tensor
    ) -> None:
        """One query for each row of ``table`` [T, pages]; ``lengths`` [T] int32 are on the host."""
        heads, kv_heads = query.shape[1], key.shape[2]
        _call("atb", "_npu_paged_attention", query, key, value, kv_heads, heads, scale, table, lengths, out)

    def paged_latent_attention(
        self, query: Tensor, latent: Tensor, scale: float, table: Tensor, lengths: Tensor, value_width: int, out: Tensor
    ) -> None:
        """The same over latent rows [pages, size, 1, width], whose first ``value_width`` are the values."""
        _call(
            "atb", "_npu_paged_attention_mla", query, latent, 1, query.shape[1], scale, table, lengths, value_width, out
        )

    def write_cache(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        """Rows [T, heads, width] to int32 ``slots``; a negative one is skipped."""
        _call("atb", "_npu_reshape_and_cache", key, value, key_cache, value_cache, slots)

    def write_latent_cache(self, rows: Tensor, cache: Tensor, slots: Tensor) -> None:
        """The same for a cache of one tensor."""
        _call("atb", "_npu_reshape_and_cache_siso", rows, cache, slots)

    def scatter_cache(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        """aclnn's cache write; every slot must be one of the cache."""
        _call("npu", "npu_scatter_pa_kv_cache", key, value, key_cache, value_cache, slots, cache_mode="Norm")

    @property
    def _fused_name(self) -> str:
        return _FUSED_V2 if self.fused == 2 else _FUSED_V1

    def _named(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.fused == 2:
            return arguments
        assert arguments.pop("learnable_sink", None) is None, "version 1 has no sinks; takes_sinks says so"
        return {_V1_NAMES.get(name, name): value for name, value in arguments.items()}


def load(device: str) -> Operators:
    """The operators for tensors on ``device``, with torch-npu imported if it is a card.

    Raises PluginLoadError where torch-npu is missing, does not load or sees no card, and for another device.
    """
    if emulated:
        return Operators.here()
    if device != "npu":
        raise PluginLoadError(
            f"ascend runs on an NPU, and the cache is on {device!r}",
            given=device,
            accepted="npu",
            hint="to try it without a card: attn verify ascend --device emulated:ascend",
        )
    import_torch_npu()
    if not torch.npu.is_available():  # type: ignore[attr-defined]
        raise PluginLoadError(
            "torch-npu is here, and sees no NPU", accepted="an Atlas A2 or A3 card", hint="npu-smi info; attn doctor"
        )
    return Operators.here()


def import_torch_npu() -> Any:
    """torch-npu, which registers the operators. Raises PluginLoadError that says what does not load."""
    try:
        return importlib.import_module("torch_npu")
    except ImportError as error:
        raise PluginLoadError(
            f"torch-npu does not load: {error}",
            accepted=f"torch-npu>={MINIMUM_TORCH_NPU} beside its torch, and CANN with its environment set",
            hint="source the toolkit's set_env.sh, then: attn doctor",
        ) from error


def soc_version() -> int:
    """torch-npu's number of the chip."""
    return int(import_torch_npu().npu.get_soc_version())


def _has(namespace: str, name: str, parameter: str | None = None) -> bool:
    """Whether there is an operator of that name, and whether it has ``parameter``."""
    operator = getattr(getattr(torch.ops, namespace), name, None)
    if operator is None or parameter is None:
        return operator is not None
    return any(argument.name == parameter for argument in operator.default._schema.arguments)


def _call(namespace: str, name: str, *arguments: Any, overload: str = "default", **named: Any) -> Any:
    operator: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    try:
        return operator(*arguments, **named)
    except RuntimeError as error:
        raise KernelError(
            f"{namespace}::{name} refused or failed: {error}", hint="attn doctor says what is installed"
        ) from error
