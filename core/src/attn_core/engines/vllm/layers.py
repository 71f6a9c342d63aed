"""vLLM's attention layers in the planner's words: dtypes, layer kinds, and what the adapter does not translate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from attn_core.engines.facts import DTYPE_NAMES, dtype_name
from attn_core.errors import ConfigError
from attn_core.planning.config import LayerKind

_FP8: Final = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}

#: What vLLM may ask a backend for and this adapter has no translation of: the name of vLLM's flag, what it is.
UNTRANSLATED: Final[Mapping[str, str]] = {
    "use_sparse": "sparse MLA (top-k indices)",
    "use_per_head_quant_scales": "an fp8 cache with a scale for each head",
    "use_non_causal": "cached layers that are not causal",
    "use_pcp": "prefill context parallelism",
    "use_dcp": "decode context parallelism",
    "use_adaptive_verification": "adaptive verification, whose query lengths only the device knows",
    "use_rswa": "reference sliding windows",
}


def kv_dtype_name(cache_dtype: str | None, dtype: torch.dtype) -> str:
    """The planner's name of vLLM's kv_cache_dtype in a model of ``dtype``. Raises ConfigError for one it has not."""
    if cache_dtype in (None, "auto", DTYPE_NAMES.get(dtype)):
        return "auto"
    if cache_dtype not in _FP8:
        raise ConfigError(
            f"kv_cache_dtype {cache_dtype} in a model of {dtype_name(dtype)}",
            given=cache_dtype,
            accepted=", ".join(("auto", dtype_name(dtype), *_FP8)),
        )
    return _FP8[cache_dtype]


def kinds_of(layers: Iterable[Any]) -> tuple[LayerKind, ...]:
    """The distinct kinds of vLLM's attention layers, whose place in ``layers`` is their layer id."""
    ids: dict[LayerKind, list[int]] = {}
    for layer_id, layer in enumerate(layers):
        ids.setdefault(layer.impl.kind_of(layer), []).append(layer_id)
    return tuple(_with_ids(kind, found) for kind, found in ids.items())


def only(kinds: Iterable[LayerKind], layer_ids: frozenset[int]) -> tuple[LayerKind, ...]:
    """The kinds of these layers, with these layers alone."""
    cut = [_with_ids(kind, [i for i in kind.layer_ids if i in layer_ids]) for kind in kinds]
    return tuple(kind for kind in cut if kind.layer_ids)


def _says_nothing(value: Any) -> bool:
    """vLLM's ways to leave an option out."""
    return value is None or value is False or (type(value) is int and value == -1)


def _with_ids(kind: LayerKind, layer_ids: list[int]) -> LayerKind:
    return replace(kind, layer_ids=tuple(layer_ids))


def refuse_extras(extras: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments of a layer that would change what is computed, and that nobody here knows."""
    unknown = {name: value for name, value in extras.items() if not _says_nothing(value)}
    if unknown:
        raise ConfigError(
            f"the model's attention layers ask for {', '.join(f'{k}={v!r}' for k, v in unknown.items())}",
            accepted="scale, sliding_window, logits_soft_cap, sinks",
            hint="another --attention-backend of vLLM may know it",
        )
