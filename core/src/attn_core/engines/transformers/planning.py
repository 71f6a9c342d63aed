"""Plans for transformers' models: what a model needs, on the device that it is on."""

from __future__ import annotations

from typing import Any

from attn_core.engines.facts import dtype_name, system_of
from attn_core.generate.model import check_served
from attn_core.planning.config import AttentionConfig
from attn_core.planning.plan import Plan, plan


def plan_cached(
    model: Any,
    backend: str,
    *,
    max_draft_tokens: int,
    page_size: int | None,
    kv_layout: str | None,
    max_context_len: int,
) -> Plan:
    """The plan of the model's cached layers.

    Raises ConfigError for a model that cannot be served, and what ``plan`` raises.
    """
    config = AttentionConfig.from_hf(model.config.to_dict()).without_towers()
    check_served(model.config, has_cross=any(kind.cross for kind in config.layers))
    config = config.replace(
        dtype=dtype_name(model.dtype),
        page_size=page_size,
        kv_layout=kv_layout,
        speculative_num_draft_tokens=max_draft_tokens,
        max_context_len=max_context_len,
    )
    phases = config.phases if not max_draft_tokens else ("prefill", "decode", "verify")
    return plan(config, backend, system=system_of(model.device.type), phases=phases)


def encoder_len(config: Any, images: int) -> int:
    """Keys that cross layers keep for the ``images`` of a request; 0 for a model without cross layers."""
    if not getattr(config.get_text_config(), "cross_attention_layers", None):
        return 0
    vision = config.vision_config
    return int(images * vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1))
