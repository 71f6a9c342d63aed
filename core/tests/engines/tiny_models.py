"""Tiny random models of every family that the adapter serves, sensitive to each feature of their attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

# initializer_range 0.2: with the default 0.02 attention is nearly uniform, and a wrong mask hardly changes a logit.
BASE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": None,
}  # fmt: skip
TEXT: dict[str, Any] = {**BASE, "head_dim": 16}
LATENT: dict[str, Any] = {
    **BASE, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
#: a token's own logit must not hide what attention does
UNTIED = {"tie_word_embeddings": False}
LAYER_TYPES = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "vision_use_head": False, "initializer_range": 0.2,
}  # fmt: skip
IMAGE = 255


def gpt_oss() -> Any:
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **TEXT, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, layer_types=LAYER_TYPES,
            rope_parameters=ROPE, pad_token_id=0,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def gemma3_vision() -> Any:
    config = hf.Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": LAYER_TYPES},
        vision_config=TOWER, mm_tokens_per_image=4, boi_token_index=253, eoi_token_index=254,
    )  # fmt: skip
    config.image_token_id = IMAGE
    model = hf.Gemma3ForConditionalGeneration(config)
    # It begins at 0, which makes every image token the same.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model


def paligemma(**text: Any) -> Any:
    config = hf.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", **text}, projection_dim=64, hidden_size=64,
        vision_config={**TOWER, "projection_dim": 64, "model_type": "siglip_vision_model"},
    )  # fmt: skip
    config.image_token_id = IMAGE
    return hf.PaliGemmaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BASE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**BASE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **TEXT,
            **UNTIED,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            layer_types=LAYER_TYPES,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**TEXT, **UNTIED, query_pre_attn_scalar=24, sliding_window=8, layer_types=LAYER_TYPES)
    ),
    "gpt_oss": gpt_oss,
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**LATENT)),
    "deepseek_v3_yarn": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**LATENT, rope_parameters=YARN)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**LATENT)),
}
#: of PaliGemma 2, whose prefix is seen even where the window ends in it
GEMMA2_TEXT = {"model_type": "gemma2", "query_pre_attn_scalar": 16}
VISION: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "gemma3": (gemma3_vision, [2, 5, 6, 253, IMAGE, IMAGE, IMAGE, IMAGE, 254, *range(7, 19)]),
    "paligemma2": (
        lambda: paligemma(**GEMMA2_TEXT, sliding_window=24, layer_types=LAYER_TYPES),
        [*[IMAGE] * 16, 2, 5, 6, 7],
    ),
    "paligemma": (paligemma, [*[IMAGE] * 16, 2, 5, 6, 7]),
}


def mllama() -> Any:
    config = hf.MllamaConfig(
        text_config={**BASE, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
                       "attention_heads": 2, "image_size": 28, "patch_size": 7, "max_num_tiles": 2,
                       "vision_output_dim": 64, "intermediate_layers_indices": [0],
                       "supported_aspect_ratios": [[1, 1], [1, 2]]},
        image_token_index=IMAGE,
    )  # fmt: skip
    model = hf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:  # they begin at 0, which would hide the cross layers
            torch.nn.init.constant_(parameter, 1.0)
    return model
