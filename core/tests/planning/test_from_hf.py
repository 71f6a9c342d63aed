"""Configs are read as the transformers library reads them: its config classes and modules are the oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attn_core.errors import ConfigError, ModelFolderError, UnknownModelError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.families import FAMILIES
from attn_core.planning.from_hf import config_from_hf
from attn_core.planning.presets import load_preset, preset_data, preset_names

torch.set_num_threads(1)

CLASSES: dict[str, type[transformers.PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gemma3": transformers.Gemma3Config,
    "paligemma": transformers.PaliGemmaConfig,
    "gpt_oss": transformers.GptOssConfig,
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
    "kimi_k2": transformers.DeepseekV3Config,
    "mllama": transformers.MllamaConfig,
    "mllama_text_model": transformers.MllamaConfig,
    "whisper": transformers.WhisperConfig,
}


def written(config: Any) -> dict[str, Any]:
    """The config.json that the library would save."""
    return dict(json.loads(config.to_json_string(use_diff=False)))


def attention(config: AttentionConfig) -> AttentionConfig:
    """The attention alone, whatever the model is called."""
    return config.replace(model="", dtype="bfloat16")


def test_every_family_is_checked_against_its_class() -> None:
    assert {family.model_type for family in FAMILIES} == set(CLASSES)


@pytest.mark.parametrize("model_type", sorted(set(CLASSES) - {"mllama_text_model"}))
def test_keys_that_are_left_out_have_the_librarys_defaults(model_type: str) -> None:
    full = written(CLASSES[model_type]())
    if model_type == "deepseek_v2":
        full.pop("num_key_value_heads")  # the class copies the heads; latent attention has no use for it
    assert attention(config_from_hf({"model_type": model_type})) == attention(config_from_hf(full))


def test_the_text_half_of_mllama_has_the_librarys_defaults() -> None:
    full = written(transformers.MllamaConfig().text_config)
    assert attention(config_from_hf({"model_type": "mllama_text_model"})) == attention(config_from_hf(full))


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_what_the_library_makes_of_it(name: str) -> None:
    data = dict(preset_data(name))
    data.pop("_source")
    made = CLASSES[data.pop("model_type")](**data)
    full = written(made)
    full["architectures"] = data["architectures"]
    assert attention(config_from_hf(full)) == attention(load_preset(name))


@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES if family.architectures])
def test_the_architectures_of_a_family_are_classes_of_the_library(family: str) -> None:
    (found,) = [each for each in FAMILIES if each.model_type == family]
    assert [name for name in found.architectures if not hasattr(transformers, name)] == []


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 4,
    "num_key_value_heads": 6,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}
PATTERN = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

#: the classes by another name: their __init__ takes keys that their fields, which a type checker sees, do not list
hf: Any = transformers

#: name -> (model class, config)
DECODERS: dict[str, tuple[str, transformers.PreTrainedConfig]] = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL)),
    "llama with a head width": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, head_dim=20)),
    "mistral": ("MistralForCausalLM", transformers.MistralConfig(**SMALL, sliding_window=8)),
    "mistral without window": ("MistralForCausalLM", transformers.MistralConfig(**SMALL, sliding_window=None)),
    "mixtral": ("MixtralForCausalLM", transformers.MixtralConfig(**SMALL, num_local_experts=2, sliding_window=8)),
    "qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config(**SMALL)),
    "qwen2 sliding": (
        "Qwen2ForCausalLM",
        transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    ),
    "qwen2 moe sliding": (
        "Qwen2MoeForCausalLM",
        transformers.Qwen2MoeConfig(
            **SMALL,
            **EXPERTS,
            shared_expert_intermediate_size=8,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=3,
        ),
    ),
    "qwen3": ("Qwen3ForCausalLM", transformers.Qwen3Config(**SMALL, head_dim=16)),
    "qwen3 moe sliding": (
        "Qwen3MoeForCausalLM",
        hf.Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16, use_sliding_window=True, sliding_window=8),
    ),
    "gemma": ("GemmaForCausalLM", transformers.GemmaConfig(**SMALL, head_dim=16)),
    "gemma2": (
        "Gemma2ForCausalLM",
        transformers.Gemma2Config(
            **SMALL, head_dim=16, query_pre_attn_scalar=12, sliding_window=8, attn_logit_softcapping=7.0
        ),
    ),
    "gemma2 without cap": (
        "Gemma2ForCausalLM",
        transformers.Gemma2Config(
            **SMALL, head_dim=16, sliding_window=8, attn_logit_softcapping=None, layer_types=PATTERN
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        hf.Gemma3TextConfig(**SMALL, head_dim=16, query_pre_attn_scalar=12, sliding_window=8, sliding_window_pattern=3),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        transformers.GptOssConfig(**SMALL, head_dim=16, sliding_window=8, num_local_experts=2, num_experts_per_tok=1),
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", transformers.DeepseekV2Config(**{**SMALL, **LATENT})),
    "deepseek_v2 yarn": (
        "DeepseekV2ForCausalLM",
        transformers.DeepseekV2Config(**{**SMALL, **LATENT}, rope_parameters={**YARN, "rope_theta": 1e4}),
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", transformers.DeepseekV3Config(**{**SMALL, **LATENT})),
    "deepseek_v3 yarn": (
        "DeepseekV3ForCausalLM",
        transformers.DeepseekV3Config(**{**SMALL, **LATENT}, rope_parameters={**YARN, "rope_theta": 1e4}),
    ),
}


def modules(architecture: str, config: transformers.PreTrainedConfig) -> dict[int, Any]:
    """The attention module of each layer of the library's own model, with no weights."""
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    found = [
        module for name, module in model.named_modules() if name.endswith("self_attn") and hasattr(module, "layer_idx")
    ]
    return {module.layer_idx: module for module in found}


def window_of(module: Any) -> int | None:
    """Mistral and Mixtral modules read the window from their config when they are called, all others keep it."""
    kept = module.config if type(module).__name__ in ("MistralAttention", "MixtralAttention") else module
    return getattr(kept, "sliding_window", None)


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_each_layer_is_what_the_librarys_own_module_is(name: str) -> None:
    architecture, config = DECODERS[name]
    made = config_from_hf({**written(config), "architectures": [architecture]})
    layers = modules(architecture, config)
    assert sorted(layers) == list(range(made.num_layers))
    for layer_id, module in layers.items():
        kind = made.kind_of(layer_id)
        assert kind.softmax_scale == pytest.approx(module.scaling, rel=1e-12)
        assert kind.sliding_window == window_of(module)
        assert kind.softcap == (getattr(module, "attn_logit_softcapping", None) or 0.0)
        assert kind.sinks == hasattr(module, "sinks")
        assert module.is_causal
        if kind.kind == "mla":
            assert (kind.num_q_heads, kind.num_kv_heads) == (module.num_heads, 1)
            assert kind.v_head_dim == module.kv_lora_rank
            assert kind.qk_head_dim == module.kv_lora_rank + module.qk_rope_head_dim
        else:
            assert kind.qk_head_dim == kind.v_head_dim == module.head_dim
            assert kind.num_q_heads * kind.qk_head_dim == module.q_proj.out_features
            assert kind.num_kv_heads * kind.qk_head_dim == module.k_proj.out_features


VISION = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("architecture", "config", "text"),
    [
        (
            "Gemma3ForConditionalGeneration",
            transformers.Gemma3Config(
                text_config={**SMALL, "head_dim": 16, "sliding_window": 8},
                vision_config={**VISION, "model_type": "siglip_vision_model"},
            ),
            "gemma3_text",
        ),
        (
            "PaliGemmaForConditionalGeneration",
            transformers.PaliGemmaConfig(
                text_config={**SMALL, "head_dim": 16, "model_type": "gemma"},
                vision_config={**VISION, "model_type": "siglip_vision_model"},
            ),
            "gemma",
        ),
        (
            "PaliGemmaForConditionalGeneration",
            transformers.PaliGemmaConfig(
                text_config={**SMALL, "head_dim": 16, "model_type": "gemma2", "sliding_window": 8},
                vision_config={**VISION, "model_type": "siglip_vision_model"},
            ),
            "gemma2",
        ),
    ],
)
def test_a_model_with_a_tower_has_its_text_kinds_its_spans_and_a_ragged_tower(
    architecture: str, config: transformers.PreTrainedConfig, text: str
) -> None:
    made = config_from_hf({**written(config), "architectures": [architecture]})
    alone = config_from_hf({**written(config.text_config), "model_type": text, "use_bidirectional_attention": None})
    *kinds, tower = made.layers
    assert tuple(kinds) == alone.layers
    assert (made.bidirectional_spans, made.multimodal) == (True, True)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    (module,) = [m for name, m in model.named_modules() if name.endswith("self_attn") and not hasattr(m, "layer_idx")]
    assert tower == LayerKind(
        module.num_heads, module.num_heads, module.head_dim, module.head_dim, ragged=True, causal=False
    )
    assert tower.softmax_scale == module.scale
    assert module.is_causal is False


def test_the_layers_of_mllama_that_cross_are_those_of_the_library() -> None:
    text = {**SMALL, "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.MllamaConfig(text_config=text, vision_config={"num_hidden_layers": 1, "num_global_layers": 1})
    made = config_from_hf({**written(config), "architectures": ["MllamaForConditionalGeneration"]})
    with torch.device("meta"):
        model = transformers.MllamaForConditionalGeneration(config)
    for layer_id, layer in enumerate(model.model.language_model.layers):
        crossing = hasattr(layer, "cross_attn")
        module = layer.cross_attn if crossing else layer.self_attn
        kind = made.kind_of(layer_id)
        assert (kind.cross, kind.causal) == (crossing, not crossing)
        assert (kind.num_q_heads, kind.num_kv_heads, kind.qk_head_dim) == (6, 3, module.head_dim)
        assert kind.softmax_scale == pytest.approx(module.scaling)
    assert not [kind for kind in made.layers if kind.ragged]


def test_the_three_attentions_of_whisper_are_those_of_the_library() -> None:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, decoder_layers=3, decoder_attention_heads=4,
        encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    made = config_from_hf({**written(config), "architectures": ["WhisperForConditionalGeneration"]})
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    own, cross, encoder = made.layers
    decoder = model.model.decoder.layers
    assert (own.layer_ids, cross.layer_ids, encoder.layer_ids) == ((0, 1, 2), (3, 4, 5), ())
    for kind, module in (
        (own, decoder[0].self_attn),
        (cross, decoder[0].encoder_attn),
        (encoder, model.model.encoder.layers[0].self_attn),
    ):
        assert (kind.num_q_heads, kind.qk_head_dim) == (module.num_heads, module.head_dim)
        assert kind.softmax_scale == module.scaling
        assert kind.causal == module.is_causal


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"architectures": ["LlamaForCausalML"]}, "the nearest is 'LlamaForCausalLM'"),
        (
            {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v3"},
            "the nearest is 'DeepseekV3ForCausalLM'",
        ),
        ({"architectures": ["Llama4ForCausalLM"]}, "'Llama4ForCausalLM' is not known"),
        ({"model_type": "lama"}, "the nearest is 'llama'"),
        ({"model_type": "zzz"}, "describe the layers in an AttentionConfig"),
        ({}, "neither architectures nor a model_type"),
    ],
)
def test_an_unknown_architecture_names_the_nearest_and_what_is_accepted(data: dict[str, Any], word: str) -> None:
    with pytest.raises(UnknownModelError, match=word) as caught:
        config_from_hf(data)
    assert caught.value.accepted


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "not defined by the contract"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "not defined by the contract"),
        ({"model_type": "qwen2", "dual_chunk_attention_config": {}}, "dual chunk"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention"]}, "there are 2 layers"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            "linear_attention are not defined",
        ),
        ({"model_type": "gpt_oss", "sliding_window": None}, "sliding_window is None"),
        ({"model_type": "llama", "num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "not a multiple"),
        ({"model_type": "llama", "dtype": "float64"}, "float64"),
        ({"model_type": "gemma2", "attn_logit_softcapping": "50"}, "a number"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "a positive number"),
        (
            {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "mscale_all_dim": 1}},
            "the factor of rope_scaling",
        ),
        ({"model_type": "deepseek_v3", "rope_scaling": "yarn"}, "no table"),
        ({"model_type": "mllama", "text_config": {"cross_attention_layers": [99]}}, "there are 40 layers"),
        ({"model_type": "mllama", "text_config": {"cross_attention_layers": "all"}}, "layer indices"),
        ({"model_type": "gemma3", "text_config": 3}, "a nested config"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma2"}}, "of type 'gemma2'"),
        ({"model_type": "gemma3", "vision_config": {"model_type": "clip"}}, "of type 'clip'"),
        ({"model_type": "paligemma", "text_config": {"model_type": "llama"}}, "of type 'llama'"),
        ({"model_type": "paligemma", "text_config": {"use_bidirectional_attention": False}}, "prefix is causal"),
    ],
)
def test_what_asks_for_other_attention_or_makes_no_sense_is_refused(data: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        config_from_hf(data)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "half"}, "float16"),
    ],
)
def test_the_dtype_is_the_configs_and_float32_without_one(data: dict[str, Any], dtype: str) -> None:
    assert config_from_hf({"model_type": "llama", **data}).dtype == dtype


def test_a_scalar_may_be_written_as_a_float() -> None:
    made = config_from_hf({"model_type": "gemma2", "query_pre_attn_scalar": 144.0, "attn_logit_softcapping": 50})
    assert {(kind.scale, kind.softcap) for kind in made.layers} == {(1 / 12, 50.0)}


def test_the_dtype_of_the_text_half_counts() -> None:
    assert config_from_hf({"model_type": "gemma3", "text_config": {"torch_dtype": "bfloat16"}}).dtype == "bfloat16"


def test_from_hf_takes_a_mapping_a_path_or_a_folder_and_how_it_is_served(tmp_path: Path) -> None:
    data = {"model_type": "llama", "_name_or_path": "someone/model"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    expected = replace(config_from_hf(data), page_size=16)
    assert expected.model == "someone/model"
    for source in (data, tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert AttentionConfig.from_hf(source, page_size=16) == expected
    with pytest.raises(ModelFolderError, match="there is no"):
        AttentionConfig.from_hf(tmp_path / "missing")
