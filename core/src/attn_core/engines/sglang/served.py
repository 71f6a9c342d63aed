"""What a model runner of SGLang serves, as facts: its attention layers, as the model's code has them, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from attn_core.engines.facts import dtype_name
from attn_core.engines.sglang.registration import backend_name
from attn_core.errors import ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase

_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """One RadixAttention of the model, and what it asks for."""

    module: Any
    kind: LayerKind


@dataclass(frozen=True, slots=True)
class Speculation:
    """How many draft tokens a request the target checks at once, and whether they may form a tree."""

    tokens: int
    tree: bool


def layers_of(model: nn.Module, *, latent: bool) -> dict[int, ServedLayer]:
    """The attention layers that this rank runs, by layer id, as absorbed ones if ``latent``.

    A latent model has two modules a layer: what it does with expanded keys is left out, since it is told to absorb.
    Raises ConfigError, with all of them, for layers that ask for what the contract cannot say.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    found: dict[int, ServedLayer] = {}
    wrong: list[str] = []
    for owner, module in _with_owners(model, RadixAttention):
        if latent and module.tp_k_head_num != 1:
            continue
        reasons = list(_unsaid(module))
        if module.layer_id in found:
            reasons.append("another module has the same id")
        if reasons:
            wrong.append(f"layer {module.layer_id}: {'; '.join(reasons)}")
            continue
        sinks = isinstance(getattr(owner, "sinks", None), torch.Tensor)
        found[module.layer_id] = ServedLayer(module, _kind(module, sinks=sinks, latent=latent))
    if wrong:
        raise ConfigError(
            "the model has attention layers that are not served through SGLang",
            trace=wrong,
            hint="choose one of SGLang's own attention backends for this model",
        )
    if not found:
        raise ConfigError("the model has no RadixAttention layer", hint="SGLang serves it in another way")
    return found


def _with_owners(model: nn.Module, type_: type) -> Iterator[tuple[nn.Module, Any]]:
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, type_):
                yield owner, child


def _kind(module: Any, *, sinks: bool, latent: bool) -> LayerKind:
    window = module.sliding_window_size  # how many tokens before its own a query sees: one less than ours
    return LayerKind(
        num_q_heads=module.tp_q_head_num,
        num_kv_heads=module.tp_k_head_num,
        qk_head_dim=module.qk_head_dim,
        v_head_dim=module.v_head_dim,
        kind="mla" if latent else "mha",
        scale=float(module.scaling),
        sliding_window=window + 1 if window is not None and window > 0 else None,
        softcap=float(module.logit_cap or 0.0),
        sinks=sinks,
        layer_ids=(module.layer_id,),
    )


def _unsaid(module: Any) -> Iterator[str]:
    """What ``module`` asks for that is not translated."""
    if module.is_cross_attention:
        yield "cross-attention"
    if module.attn_type.value != "decoder":
        yield f"attention of type {module.attn_type.value}"
    if module.use_irope:
        yield "attention in chunks (iRoPE)"
    if module.xai_temperature_len > 0:
        yield f"a temperature that follows positions from {module.xai_temperature_len} on"
    if module.logit_cap and module.logit_capping_method != "tanh":
        yield f"logits capped by {module.logit_capping_method}"
    if module.pos_encoding_mode != "NONE":
        yield f"positions encoded in attention ({module.pos_encoding_mode})"


def merged(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """Kinds that differ in their layers only, as one."""
    ids: dict[LayerKind, list[int]] = {}
    for kind in kinds:
        ids.setdefault(replace(kind, layer_ids=()), []).extend(kind.layer_ids)
    return tuple(replace(kind, layer_ids=tuple(sorted(members))) for kind, members in ids.items())


def speculation_of(spec: Any) -> Speculation | None:
    """From SGLang's settings ``spec``; None without speculative decoding. N-grams make trees of any form."""
    if spec.speculative_algorithm is None:
        return None
    tree = spec.speculative_algorithm == "NGRAM" or (spec.speculative_eagle_topk or 1) > 1
    return Speculation(int(spec.speculative_num_draft_tokens), tree)


def phases_of(runner: Any, backend: str, speculation: Speculation | None, attention_mode: str) -> tuple[Phase, ...]:
    """What ``backend`` is to run, where --prefill-attention-backend and --decode-attention-backend may differ.

    SGLang verifies with the one that its speculative_attention_mode names, which is prefill by default.
    """
    name = backend_name(backend)
    prefill, decode = runner.prefill_attention_backend_str, runner.decode_attention_backend_str
    verifier = decode if attention_mode == "decode" else prefill
    wanted: Mapping[Phase, bool] = {
        "prefill": prefill == name,
        "decode": decode == name,
        "verify": speculation is not None and verifier == name,
    }
    return tuple(phase for phase, asked in wanted.items() if asked)


def config_of(
    runner: Any,
    kinds: list[LayerKind],
    *,
    layout: str,
    page_size: int,
    cuda_graph: bool,
    deterministic: bool,
    speculation: Speculation | None,
) -> AttentionConfig:
    """What the layers of one KV pool need. Raises ConfigError for dtypes that are not known."""
    cache = runner.kv_cache_dtype
    if cache not in _FP8 and cache != runner.dtype:
        raise ConfigError(f"a KV cache of {cache} for a model of {runner.dtype}", accepted="auto, fp8_e4m3, fp8_e5m2")
    return AttentionConfig(
        layers=merged(kinds),
        dtype=dtype_name(runner.dtype),
        kv_cache_dtype=_FP8.get(cache, "auto"),
        page_size=page_size,
        kv_layout=layout,
        max_context_len=int(runner.req_to_token_pool.req_to_token.shape[1]),
        cuda_graph=cuda_graph,
        deterministic=deterministic,
        batch_invariant=deterministic,
        speculative_num_draft_tokens=0 if speculation is None else speculation.tokens,
        speculative_eagle_topk=2 if speculation is not None and speculation.tree else 1,
        model=str((runner.model_config.hf_config.architectures or ["model"])[0]),
    )
