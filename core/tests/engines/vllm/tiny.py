"""Tiny random models, each sensitive to every feature of its attention, with head widths that vLLM's kernels have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

# initializer_range 0.2: with the default 0.02 attention is nearly uniform, and a wrong mask hardly changes a logit.
BASE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2, "eos_token_id": None,
    "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# The widths of DeepSeek's latent are those that vLLM's CPU kernel is compiled for.
LATENT: dict[str, Any] = {
    **BASE, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64, "v_head_dim": 32, "head_dim": 64, "first_k_dense_replace": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip


def gemma2() -> Any:
    model = hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **{**BASE, "tie_word_embeddings": True}, head_dim=32, query_pre_attn_scalar=24, sliding_window=32,
            attn_logit_softcapping=5.0, final_logit_softcapping=None,
        )
    )  # fmt: skip
    # Tied embeddings as large as what attention adds to them would only ever say a token again.
    model.model.embed_tokens.weight.data.mul_(0.1)
    return model


def gpt_oss() -> Any:
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **BASE, head_dim=32, sliding_window=32, num_local_experts=4, num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BASE)),
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "deepseek": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**LATENT)),
}
