"""What the operators that are here cannot do, beyond the manifest: reasons for planning, checks of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from attn_core.errors import ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer

from attn_ascend.attend import takes_tokens
from attn_ascend.latent import check_latent
from attn_ascend.operators import Operators
from attn_ascend.step import MAX_KEYS

PAGE_SIZE: Final = 128
MAX_QUERY_HEADS: Final = 256
#: Query heads for each key head.
MAX_GROUP: Final = {"mha": 64, "mla": 128}
#: Elements of all heads of one token: of queries in the layout BSND, and of keys in a page.
MAX_ROW: Final = 65535
#: Elements of one layer's keys: the operator counts them in int32.
MAX_POOL: Final = 2**31 - 1
#: Widest head of ATB's paged attention.
MAX_PAGED_WIDTH: Final = 256
#: torch-npu's numbers of the chips with fused operators: Atlas A2 (910B1 .. 910B4-1) and A3 (910_9391 .. 910_9362).
SUPPORTED_SOCS: Final = (range(220, 240), range(250, 260))

DTYPES: Final = (torch.float16, torch.bfloat16)


def refusals(operators: Operators, config: AttentionConfig, phase: Phase) -> Iterator[Reason]:
    """Everything that stands against ``phase`` of ``config`` with these operators."""
    if config.max_context_len is not None and config.max_context_len > MAX_KEYS:
        yield _refused("max_context_len", config.max_context_len, f"up to {MAX_KEYS}")
    for i, kind in enumerate(config.layers):
        if kind in config.kinds(phase):
            yield from _latent(operators, i) if kind.kind == "mla" else _heads(operators, kind, i)
            if kind.kind != "mla" and not operators.fused:
                yield from _without_fused(operators, config, phase, kind, i)


def _latent(operators: Operators, index: int) -> Iterator[Reason]:
    if not operators.paged_latent and operators.fused != 2:
        hint = "install CANN's NNAL package, or a torch-npu with npu_fused_infer_attention_score_v2"
        yield _refused(
            "kind", "mla", "mha: neither ATB's paged MLA nor the fused operator's version 2 is here", hint, index
        )


def _heads(operators: Operators, kind: LayerKind, index: int) -> Iterator[Reason]:
    if not operators.fused:
        return
    if kind.num_q_heads > MAX_QUERY_HEADS:
        yield _refused("num_q_heads", kind.num_q_heads, f"up to {MAX_QUERY_HEADS}", None, index)
    layer = AttentionLayer.of_kind(kind, 0, sinks=torch.empty(0) if kind.sinks else None)
    if not takes_tokens(layer, paged=not kind.ragged) and kind.num_q_heads * kind.qk_head_dim >= MAX_ROW:
        yield _refused("num_q_heads * head_dim", kind.num_q_heads * kind.qk_head_dim, f"below {MAX_ROW}", None, index)
    if not kind.ragged and kind.num_kv_heads * kind.qk_head_dim > MAX_ROW:
        yield _refused("num_kv_heads * head_dim", kind.num_kv_heads * kind.qk_head_dim, f"up to {MAX_ROW}", None, index)


def _without_fused(
    operators: Operators, config: AttentionConfig, phase: Phase, kind: LayerKind, index: int
) -> Iterator[Reason]:
    """What remains with ATB's paged attention alone: causal attention of one query at a time."""
    hint = "a torch-npu with npu_fused_infer_attention_score (op-plugin 6.0 or newer)"
    if not operators.paged:
        yield _refused(
            "operators", "attention", "none: torch-npu has neither the fused nor the paged operator here", hint, index
        )
        return
    for feature in sorted(config.features(kind, phase) - {"verify_chain"}):
        yield _refused("features", feature, "verify_chain, with ATB's paged attention alone", hint, index)
    if kind.qk_head_dim > MAX_PAGED_WIDTH:
        yield _refused(
            "head_dim", kind.qk_head_dim, f"up to {MAX_PAGED_WIDTH}, with ATB's paged attention alone", hint, index
        )


def refuse_soc(version: int) -> Iterator[Reason]:
    """A chip without the fused operators; ``version`` is torch-npu's number of it."""
    if not any(version in supported for supported in SUPPORTED_SOCS):
        yield _refused("chip", f"soc version {version}", "Atlas A2 (910B) and A3 (910_93)")


def _refused(field: str, wanted: object, have: str, hint: str | None = None, kind: int | None = None) -> Reason:
    return reason("build_unsupported", field, wanted, have, hint, kind)


def check_cache(cache: KVCache) -> None:
    """Raise ConfigError for a cache that the operators cannot read, copied or not."""
    if cache.page_size != PAGE_SIZE or cache.layout not in ("NHD", "MLA") or cache.dtype not in DTYPES:
        raise ConfigError(
            f"a cache of layout {cache.layout}, pages of {cache.page_size}, {cache.dtype}",
            accepted=f"NHD or MLA, pages of {PAGE_SIZE}, float16 or bfloat16",
        )
    for layer_id in cache.layer_ids:
        for tensor in (cache.k(layer_id), cache.v(layer_id)):
            if tensor is None:
                continue
            if tensor.numel() > MAX_POOL:
                raise ConfigError(
                    f"layer {layer_id}: a cache of {tensor.numel()} elements", accepted=f"at most {MAX_POOL} a tensor",
                    hint="fewer pages",
                )  # fmt: skip


def check_layer(layer: AttentionLayer, *, paged: bool) -> None:
    """Raise ConfigError for what no operator here computes; the plan refuses the same before anything runs."""
    group = MAX_GROUP[layer.kind]
    problems = [
        (layer.softcap != 0, f"softcap {layer.softcap}", "no softcap: the operators have no such parameter"),
        (layer.cross, "cross attention", "self attention"),
        (layer.k_scale != 1 or layer.v_scale != 1, "a scaled cache", "k_scale = v_scale = 1"),
        (layer.group_size > group, f"{layer.group_size} query heads for each KV head", f"up to {group}"),
    ]
    for holds, given, accepted in problems:
        if holds:
            raise ConfigError(
                f"layer {layer.layer_id}: {given}", accepted=accepted, hint="plan with this layer: it is refused there"
            )
    if layer.kind == "mla":
        check_latent(layer)
        if layer.sliding_window is not None or layer.sinks is not None:
            raise ConfigError(f"layer {layer.layer_id}: MLA with a window or sinks", accepted="MLA without them")
        return
    equal = layer.qk_head_dim == layer.v_head_dim and layer.qk_head_dim % 16 == 0
    if not equal and (paged or not takes_tokens(layer, paged=False)):
        raise ConfigError(
            f"layer {layer.layer_id}: heads of {layer.qk_head_dim}/{layer.v_head_dim}",
            accepted="equal widths, a multiple of 16 (192/128 over given keys)",
        )
