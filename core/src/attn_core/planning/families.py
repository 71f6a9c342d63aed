"""The known model families: their layer kinds, and the defaults that their configs may leave out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attn_core.errors import ConfigError
from attn_core.planning import hf_defaults as defaults
from attn_core.planning.config import LayerKind
from attn_core.planning.hf_fields import Fields

_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a family reads out of a config."""

    layers: tuple[LayerKind, ...]
    max_context_len: int | None
    bidirectional_spans: bool = False
    multimodal: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One model type: the architectures that are of it, how it is read, and what the library fills in."""

    model_type: str
    architectures: tuple[str, ...]
    read: Callable[[Fields], Parts]
    filled: defaults.Defaults


def _by_window(windows: Sequence[int | None], **kind: Any) -> tuple[LayerKind, ...]:
    """One kind for each distinct window, in the order in which the windows first appear."""
    return tuple(
        LayerKind(sliding_window=window, layer_ids=tuple(i for i, w in enumerate(windows) if w == window), **kind)
        for window in dict.fromkeys(windows)
    )


def _gqa(fields: Fields, **more: Any) -> dict[str, Any]:
    """Heads and widths as almost all decoders write them."""
    heads = fields.integer("num_attention_heads")
    width = fields.maybe_integer("head_dim") or fields.integer("hidden_size") // heads
    kv_heads = fields.maybe_integer("num_key_value_heads") or heads
    return {"num_q_heads": heads, "num_kv_heads": kv_heads, "qk_head_dim": width, "v_head_dim": width, **more}


def _uniform(fields: Fields, window: int | None = None) -> Parts:
    windows = [window] * fields.integer("num_hidden_layers")
    return Parts(_by_window(windows, **_gqa(fields)), fields.maybe_integer("max_position_embeddings"))


def _windowed(fields: Fields, types: Sequence[str], **more: Any) -> Parts:
    """Layers that are full or sliding: as ``layer_types`` lists them, else as ``types`` does."""
    listed = fields.get("layer_types")
    types = types if listed is None else listed
    if len(types) != fields.integer("num_hidden_layers"):
        raise fields.refuse("layer_types", f"there are {fields.integer('num_hidden_layers')} layers")
    unknown = sorted({str(name) for name in types} - {_FULL, _SLIDING})
    if unknown:
        raise ConfigError(
            f"{fields.model_type}: layer types {', '.join(unknown)} are not defined by the contract",
            given=unknown,
            accepted=(_FULL, _SLIDING),
        )
    window = fields.integer("sliding_window") if _SLIDING in types else None
    windows = [window if name == _SLIDING else None for name in types]
    return Parts(_by_window(windows, **_gqa(fields, **more)), fields.maybe_integer("max_position_embeddings"))


def _alternating(fields: Fields, period: int = 2) -> list[str]:
    """Every ``period``-th layer full, the others sliding."""
    return [_FULL if (i + 1) % period == 0 else _SLIDING for i in range(fields.integer("num_hidden_layers"))]


def _llama(fields: Fields) -> Parts:
    return _uniform(fields)


def _mistral(fields: Fields) -> Parts:
    if fields.get("layer_types") is not None:
        raise fields.refuse("layer_types", "transformers ignores it for this architecture, other engines do not")
    return _uniform(fields, fields.maybe_integer("sliding_window"))


def _qwen(fields: Fields) -> Parts:
    """Qwen2, Qwen3: with ``use_sliding_window`` the layers from ``max_window_layers`` on are sliding."""
    if fields.get("dual_chunk_attention_config") is not None:
        raise fields.refuse("dual_chunk_attention_config", "dual chunk attention is not defined by the contract")
    sliding = fields.get("use_sliding_window") and fields.get("sliding_window") is not None
    first = fields.get("max_window_layers") if sliding else math.inf
    layers = range(fields.integer("num_hidden_layers"))
    return _windowed(fields, [_SLIDING if i >= first else _FULL for i in layers])


def _qwen2_moe(fields: Fields) -> Parts:
    """With ``use_sliding_window`` every other layer before ``max_window_layers`` is sliding."""
    first = fields.get("max_window_layers") if fields.get("use_sliding_window") else 0
    layers = range(fields.integer("num_hidden_layers"))
    return _windowed(fields, [_SLIDING if i % 2 == 0 and i < first else _FULL for i in layers])


def _qwen3_moe(fields: Fields) -> Parts:
    """With ``use_sliding_window`` all layers are sliding."""
    return _uniform(fields, fields.maybe_integer("sliding_window") if fields.get("use_sliding_window") else None)


def _causal_gemma(fields: Fields) -> None:
    if fields.get("use_bidirectional_attention"):
        raise fields.refuse("use_bidirectional_attention", "text that is not causal is not defined by the contract")


def _gemma(fields: Fields) -> Parts:
    _causal_gemma(fields)
    return _uniform(fields)


def _scalar(fields: Fields) -> dict[str, Any]:
    """Gemma's own scale and soft cap."""
    scalar = fields.number("query_pre_attn_scalar")
    if scalar is None or scalar <= 0:
        raise ConfigError(f"{fields.model_type}: query_pre_attn_scalar is {scalar!r}", accepted="a positive number")
    return {
        "scale": scalar**-0.5,
        "softcap": fields.number("attn_logit_softcapping") or 0.0,
    }


def _gemma2(fields: Fields) -> Parts:
    _causal_gemma(fields)
    return _windowed(fields, _alternating(fields), **_scalar(fields))


def _gemma3_text(fields: Fields) -> Parts:
    _causal_gemma(fields)
    return _windowed(fields, _alternating(fields, fields.integer("sliding_window_pattern")), **_scalar(fields))


def _siglip(fields: Fields) -> LayerKind:
    """A vision tower: every patch of an image sees every other, keys are given and not cached."""
    return LayerKind(**_gqa(fields), ragged=True, causal=False)


def _gemma3(fields: Fields) -> Parts:
    """Gemma 3 with images: tokens of one image see each other; the tower runs through `ragged`."""
    text = _gemma3_text(fields.part("text_config", defaults.GEMMA3_TEXT, "gemma3_text"))
    tower = _siglip(fields.part("vision_config", defaults.SIGLIP, "siglip_vision_model"))
    return Parts((*text.layers, tower), text.max_context_len, bidirectional_spans=True, multimodal=True)


def _paligemma(fields: Fields) -> Parts:
    """A prefix language model: image and prompt are one span, all of whose tokens see each other."""
    nested = fields.get("text_config")
    if isinstance(nested, Mapping) and nested.get("model_type") == "gemma2":
        prefix = fields.part("text_config", defaults.GEMMA2, "gemma2")
        text = _windowed(prefix, _alternating(prefix), **_scalar(prefix))
    else:
        prefix = fields.part("text_config", defaults.GEMMA, "gemma", absent=defaults.PALIGEMMA_TEXT)
        text = _uniform(prefix)
    if prefix.get("use_bidirectional_attention") is False:
        raise prefix.refuse("use_bidirectional_attention", "a PaliGemma whose prefix is causal is not known")
    tower = _siglip(
        fields.part("vision_config", defaults.SIGLIP, "siglip_vision_model", absent=defaults.PALIGEMMA_TOWER)
    )
    return Parts((*text.layers, tower), text.max_context_len, bidirectional_spans=True, multimodal=True)


def _gpt_oss(fields: Fields) -> Parts:
    return _windowed(fields, _alternating(fields), sinks=True)


def _deepseek(fields: Fields) -> Parts:
    """Absorbed MLA: queries and the cached latent are kv_lora_rank + rope wide, values its first kv_lora_rank.

    The scale counts the width before absorption, and with yarn the square of 0.1 mscale_all_dim ln(factor) + 1
    (``yarn_apply_mscale`` of the models).
    """
    rank, rope = fields.integer("kv_lora_rank"), fields.integer("qk_rope_head_dim")
    kind = LayerKind(
        num_q_heads=fields.integer("num_attention_heads"),
        num_kv_heads=1,
        qk_head_dim=rank + rope,
        v_head_dim=rank,
        kind="mla",
        scale=(fields.integer("qk_nope_head_dim") + rope) ** -0.5 * _yarn_factor(fields),
        layer_ids=tuple(range(fields.integer("num_hidden_layers"))),
    )
    return Parts((kind,), fields.maybe_integer("max_position_embeddings"))


def _yarn_factor(fields: Fields) -> float:
    # transformers 5 writes rope_parameters, what is on the hub mostly rope_scaling, with `type` for `rope_type`
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise fields.refuse("rope_scaling", "it is no table")
    mscale = rope.get("mscale_all_dim") or 0
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not mscale:
        return 1.0
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor <= 0:
        raise ConfigError(
            f"{fields.model_type}: the factor of rope_scaling is {factor!r}", accepted="a positive number"
        )
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0


def _mllama(fields: Fields) -> Parts:
    """Llama 3.2 Vision: some layers attend to the encoder's keys instead of their own.

    The vision tower is no layer of ours: its mask lets patches see padding, which no form of the contract expresses.
    """
    text = fields.part("text_config", defaults.MLLAMA_TEXT, "mllama_text_model")
    return _mllama_text(text)


def _mllama_text(fields: Fields) -> Parts:
    layers = range(fields.integer("num_hidden_layers"))
    cross = fields.integers("cross_attention_layers")
    if not set(cross) <= set(layers):
        raise fields.refuse("cross_attention_layers", f"there are {len(layers)} layers")
    heads = _gqa(fields)
    own = LayerKind(**heads, layer_ids=tuple(i for i in layers if i not in cross))
    encoder = [LayerKind(**heads, cross=True, causal=False, layer_ids=tuple(sorted(cross)))] if cross else []
    return Parts((own, *encoder), fields.maybe_integer("max_position_embeddings"), multimodal=True)


def _whisper(fields: Fields) -> Parts:
    """Decoder layer i has two attentions: its own is layer i, the one to the encoder layer decoder_layers + i.

    The encoder runs through `ragged`.
    """
    count, width = fields.integer("decoder_layers"), fields.integer("d_model")
    heads, encoder_heads = fields.integer("decoder_attention_heads"), fields.integer("encoder_attention_heads")
    own = LayerKind(heads, heads, width // heads, width // heads, layer_ids=tuple(range(count)))
    cross = LayerKind(
        heads, heads, width // heads, width // heads, cross=True, causal=False, layer_ids=tuple(range(count, 2 * count))
    )
    per_head = width // encoder_heads
    encoder = LayerKind(encoder_heads, encoder_heads, per_head, per_head, ragged=True, causal=False)
    return Parts((own, cross, encoder), fields.integer("max_target_positions"), multimodal=True)


def _family(model_type: str, classes: str, read: Callable[[Fields], Parts], filled: defaults.Defaults) -> Family:
    return Family(model_type, tuple(classes.split()), read, filled)


FAMILIES: Final[tuple[Family, ...]] = (
    _family("llama", "LlamaForCausalLM LlamaModel", _llama, defaults.LLAMA),
    _family("mistral", "MistralForCausalLM MistralModel", _mistral, defaults.MISTRAL),
    _family("mixtral", "MixtralForCausalLM MixtralModel", _mistral, defaults.MIXTRAL),
    _family("qwen2", "Qwen2ForCausalLM Qwen2Model", _qwen, defaults.QWEN2),
    _family("qwen2_moe", "Qwen2MoeForCausalLM Qwen2MoeModel", _qwen2_moe, defaults.QWEN2_MOE),
    _family("qwen3", "Qwen3ForCausalLM Qwen3Model", _qwen, defaults.QWEN3),
    _family("qwen3_moe", "Qwen3MoeForCausalLM Qwen3MoeModel", _qwen3_moe, defaults.QWEN3_MOE),
    _family("gemma", "GemmaForCausalLM GemmaModel", _gemma, defaults.GEMMA),
    _family("gemma2", "Gemma2ForCausalLM Gemma2Model", _gemma2, defaults.GEMMA2),
    _family("gemma3_text", "Gemma3ForCausalLM Gemma3TextModel", _gemma3_text, defaults.GEMMA3_TEXT),
    _family("gemma3", "Gemma3ForConditionalGeneration Gemma3Model", _gemma3, {}),
    _family("paligemma", "PaliGemmaForConditionalGeneration PaliGemmaModel", _paligemma, {}),
    _family("gpt_oss", "GptOssForCausalLM GptOssModel", _gpt_oss, defaults.GPT_OSS),
    _family("deepseek_v2", "DeepseekV2ForCausalLM DeepseekV2Model", _deepseek, defaults.DEEPSEEK_V2),
    _family("deepseek_v3", "DeepseekV3ForCausalLM DeepseekV3Model", _deepseek, defaults.DEEPSEEK_V3),
    _family("kimi_k2", "", _deepseek, defaults.DEEPSEEK_V3),
    _family("mllama", "MllamaForConditionalGeneration MllamaModel", _mllama, {}),
    _family("mllama_text_model", "MllamaForCausalLM MllamaTextModel", _mllama_text, defaults.MLLAMA_TEXT),
    _family("whisper", "WhisperForConditionalGeneration WhisperModel", _whisper, defaults.WHISPER),
)
