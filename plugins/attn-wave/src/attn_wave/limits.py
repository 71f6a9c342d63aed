"""What kernels there are for, beyond the manifest: reasons for planning, checks of layers, what a config needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attn_core.errors import ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.layer import AttentionLayer

from attn_wave.compiler import WAVE_VERSION, wave_version
from attn_wave.join_variant import AnyVariant, JoinVariant
from attn_wave.shipped import ARCHITECTURES, is_current
from attn_wave.variant import DTYPES, GIVEN_ONLY, WIDTHS, Variant


def refusals(config: AttentionConfig, phase: Phase) -> Iterator[Reason]:
    """A build that ships no kernels of its sources needs the compiler that they are written for."""
    del config, phase
    if not any(is_current(arch) for arch in ARCHITECTURES) and wave_version() != WAVE_VERSION:
        yield reason(
            "build_unsupported", "wave-lang", WAVE_VERSION, wave_version() or "not installed",
            f"pip install wave-lang=={WAVE_VERSION}",
        )  # fmt: skip


def check_layer(layer: AttentionLayer, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Raises ConfigError for a layer that no kernel is for."""
    widths = layer.qk_head_dim, layer.v_head_dim
    if widths not in WIDTHS:
        raise ConfigError(
            f"layer {layer.layer_id}: heads of {widths[0]}/{widths[1]}", given=widths, accepted=map(str, WIDTHS)
        )
    if str(dtype).removeprefix("torch.") not in DTYPES or cache_dtype != dtype:
        raise ConfigError(
            f"layer {layer.layer_id}: queries of {dtype}, a cache of {cache_dtype}", accepted=f"{DTYPES}, both the same"
        )
    if layer.cross and layer.sliding_window is not None:
        raise ConfigError(f"layer {layer.layer_id}: a window on a cross layer", accepted="cross layers without one")


def needed_variants(config: AttentionConfig) -> Iterator[AnyVariant]:
    """Every kernel that a step of ``config`` may call."""
    for kind in dict.fromkeys(config.layers):
        yield from _variants_of(kind, config)


def _variants_of(kind: LayerKind, config: AttentionConfig) -> Iterator[AnyVariant]:
    widths = kind.qk_head_dim, kind.v_head_dim
    if widths not in WIDTHS:
        raise ConfigError(f"heads of {widths[0]}/{widths[1]}", given=widths, accepted=map(str, WIDTHS))
    tree = config.speculative_num_draft_tokens > 0 and config.speculative_eagle_topk > 1 and widths not in GIVEN_ONLY
    for rows in WIDTHS[widths]:
        yield Variant(*widths, config.dtype, rows, kind.softcap > 0)
    if tree:
        yield Variant(*widths, config.dtype, WIDTHS[widths][0], kind.softcap > 0, True)
    yield JoinVariant(widths[1], config.dtype)
