"""Whole models over the CUDA libraries: SmolLM2's attention, and a small DeepSeek, logits beside transformers' eager.

Random weights, rounded to bfloat16. What is right: logits no further from eager attention in float32 than twice what
eager attention in bfloat16 is; a wrong mask, scale or page is orders of magnitude further.
"""

from __future__ import annotations

import os
import traceback
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as hf
from attn_core.generate.model import PagedModel
from attn_core.planning.config import AttentionConfig
from attn_core.planning.plan import plan
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.witness import Witness
from torch import Tensor

SMOLLM2: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
}
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
RUNS = (
    ("SmolLM2 (head 64, group 3)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMOLLM2)), "fa3"),
    ("SmolLM2 (head 64, group 3)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMOLLM2)), "flashinfer"),
    ("DeepSeek-V3, 3 layers", lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)), "flashmla"),
)
PROMPTS, DECODES = (190, 33, 70), 6


def run_models() -> list[dict[str, Any]]:
    """Each model with its backend: what ran, and how far its logits are from eager attention's."""
    found = []
    for name, make, backend in RUNS:
        try:
            found.append({"model": name, **_compare(make, backend)})
        except Exception:
            found.append({"model": name, "backend": backend, "raised": traceback.format_exc(limit=6)})
        print(f"[models] {found[-1]}", flush=True)
    return found


@torch.inference_mode()
def _compare(make: Any, backend: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().to(torch.bfloat16).cuda().eval()
    sequences = [torch.randint(0, 1024, (n + DECODES,), device="cuda") for n in PROMPTS]
    ours, ran = _ours(model, sequences, backend)
    model.set_attn_implementation("eager")
    half = _eager(model, sequences)
    exact = _eager(model.float(), sequences)
    distances = [float(max((a - b).abs().max() for a, b in zip(got, exact, strict=True))) for got in (ours, half)]
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(ours, exact, strict=True))
    return {
        "backend": backend,
        "ran": ran,
        "largest_difference_from_float32": distances[0],
        "of_eager_in_bfloat16": distances[1],
        "same_next_token": f"{same} of {sum(len(s) for s in sequences)}",
        "right": distances[0] <= 2 * distances[1],
    }


def _eager(model: Any, sequences: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=sequence[None]).logits[0].float() for sequence in sequences]


def _ours(model: Any, sequences: list[Tensor], backend: str) -> tuple[list[Tensor], list[str]]:
    """Logits of every token: prompts in two chunks, then decodes, through the plan's backends."""
    config = AttentionConfig.from_hf(model.config.to_dict()).replace(dtype="bfloat16", max_context_len=512)
    config = config.replace(layers=config.cached_kinds)
    chosen = plan(config, backend, fallback="allow")
    page = chosen.config.page_size
    assert page is not None
    cache = KVCache.allocate(chosen.config, num_pages=1 + 3 * (512 // page), device="cuda")
    witness = Witness(build(chosen, cache))
    paged = PagedModel(model, chosen.config, witness.backend)
    each = 512 // page
    pages = [list(range(1 + b, 1 + 3 * each, 3)) for b in range(3)]
    steps = [(ForwardMode.EXTEND, [n // 2 for n in PROMPTS]), (ForwardMode.EXTEND, [n - n // 2 for n in PROMPTS])]
    steps += [(ForwardMode.DECODE, [1, 1, 1])] * DECODES
    done, logits = [0, 0, 0], [[], [], []]  # type: ignore[var-annotated]
    for mode, query in steps:
        lens = [n + q for n, q in zip(done, query, strict=True)]
        batch = ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=page, device="cuda")
        tokens = torch.cat([s[n:m] for s, n, m in zip(sequences, done, lens, strict=True)])
        for b, part in enumerate(paged.forward(tokens, batch).split(query)):
            logits[b].append(part.float())
        done = lens
    return [torch.cat(parts) for parts in logits], sorted(witness.names)
