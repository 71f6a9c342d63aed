"""A tiny Llama and a tiny DeepSeek with tokens that are bytes, and `attn generate` with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.cli.generate import command
from click.testing import CliRunner

hf = pytest.importorskip("transformers", reason="attn-core[demo] is not installed: there is no model to run")

SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64,
    "v_head_dim": 32, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=64)),
    "Llama, heads of 128": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=128)),
    "DeepSeek-V3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, **LATENT)),
}
SHARED = (
    "the same words at the front of both prompts, long enough to fill the first page of the cache, and then some more. "
)
PROMPTS = [SHARED + "one of them", SHARED + "and the other, a little longer", "short"]


def folder_of(name: str, folder: Path) -> Any:
    """The model, saved to ``folder`` with a tokenizer whose tokens are bytes."""
    torch.manual_seed(0)
    model = MODELS[name]().half().eval()
    model.save_pretrained(folder)
    from tokenizers import Tokenizer as Bytes
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    backend = Bytes(BPE(vocab={token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return model


def generate(folder: Path, *options: str, device: str = "emulated:ascend") -> dict[str, Any]:
    """What `attn generate` prints for the model in ``folder``, as a user runs it."""
    arguments = ["--model", str(folder), "--attention-backend", "ascend", "--dtype", "float16", "--raw", "--json"]
    arguments += ["--device", device]
    sizes = ["--max-new-tokens", "6", "--max-batch-tokens", "50", "--cache-mib", "16", "--fallback", "error"]
    result = CliRunner().invoke(command, [*PROMPTS, *arguments, *sizes, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found
