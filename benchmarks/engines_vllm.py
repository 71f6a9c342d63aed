"""What the vLLM adapter adds to a decode step: vLLM's own attention, and the same kernels of vLLM behind a plan.

    make bench-vllm        (or: .venvs/vllm/bin/python benchmarks/engines_vllm.py [--rounds N])

Engines in one process, over the same weights, decode the same requests step by step in changing turns, on one thread,
in CPU time: `CPU_ATTN`, vLLM's backend, and `CUSTOM` with a backend of ours whose three functions call the kernels that
CPU_ATTN calls, on the same memory. What is left between them is the adapter. `torch_native` is for comparison: there
the kernels differ too. All must generate the same tokens.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1",
)  # fmt: skip

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import attn_core
import torch
import transformers as hf
from attn_core import AttentionBackend, AttentionLayer, ForwardBatch
from attn_core.planning.manifest import Manifest
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

BASE = {"vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
MODELS: dict[str, dict[str, Any]] = {
    "2 layers of 128": {**BASE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "12 layers of 256": {**BASE, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12},
    "SmolLM2-135M's": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
PROMPT, STEPS = 100, 300
MANIFEST = """
schema = 1
name = "same_maths"
protocol = ">=1.0,<2"
summary = "vLLM's CPU kernels"
[[supports]]
phases = ["prefill", "decode"]
device = "cpu"
kind = "mha"
dtypes = ["float32"]
head_dims = "any"
page_sizes = [{ multiple_of = 32 }]
kv_layouts = ["HND"]
"""


class SameMaths(AttentionBackend):
    """What CPU_ATTN calls, on blocks that it reads as keys of all tokens and then values of all tokens."""

    name = "same_maths"

    def __init__(self, config: Any, kv_cache: Any) -> None:
        super().__init__(config, kv_cache)
        kind = config.layers[0]
        self.kind = kind
        self.isa = _get_attn_isa(torch.float32, kv_cache.page_size, kind.qk_head_dim, "auto")
        self.halves = {i: self._halves(kv_cache.k(i)) for i in kv_cache.layer_ids}

    def _halves(self, keys: Tensor) -> tuple[Tensor, ...]:
        blocks, heads, tokens, width = keys.shape
        whole = keys.as_strided((blocks, heads, 2 * tokens, width), (keys.stride(0), keys.stride(1), width, 1))
        return whole.chunk(2, dim=2)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch.batch_size, num_heads=self.kind.num_q_heads, num_kv_heads=self.kind.num_kv_heads,
            head_dim=self.kind.qk_head_dim, seq_lens=batch.seq_lens, dtype=torch.float32,
            query_start_loc=batch.query_start_loc, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=True, kv_cache_dtype="auto",
        )  # fmt: skip

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        keys, values = self.halves[layer.layer_id]
        if save_kv_cache:
            ops.cpu_attn_reshape_and_cache(
                k, v, keys, values, batch.slot_mapping, self.isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
            )
        out = torch.empty_like(q) if out is None else out
        ops.cpu_attention_with_kv_cache(
            query=q, key_cache=keys, value_cache=values, output=out, query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens, scale=layer.scale, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=batch.page_table, softcap=0, scheduler_metadata=batch.plan_state, s_aux=None,
            dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip
        return out

    forward_decode = forward_extend


def engine(folder: Path, requests: int, backend: str | None) -> Any:
    """An engine with its requests in, past their prompts and twenty decodes."""
    custom = {} if backend is None else {"attention_backend": "CUSTOM", "additional_config": {"attn_backend": backend}}
    llm = LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512,
        max_num_seqs=requests, kv_cache_memory_bytes=128 << 20, disable_log_stats=True, **custom,
    ).llm_engine  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=STEPS + 40, ignore_eos=True, detokenize=False)
    for i in range(requests):
        llm.add_request(str(i), {"prompt_token_ids": [(7 * i + j) % 200 + 3 for j in range(PROMPT + i)]}, sampling)
    for _ in range(25):
        llm.step()
    return llm


def step(llm: Any, times: list[float]) -> list[list[int]]:
    """One more token for each request: all of their tokens so far, and the CPU seconds that it took."""
    start = time.thread_time()
    made = llm.step()
    times.append(time.thread_time() - start)
    return [list(out.outputs[0].token_ids) for out in sorted(made, key=lambda out: int(out.request_id))]


def measure(name: str, requests: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**MODELS[name], eos_token_id=None)).save_pretrained(folder)
        backends = {"CPU_ATTN": None, "same_maths": "same_maths", "torch_native": "torch_native"}
        engines = {label: engine(Path(folder), requests, backend) for label, backend in backends.items()}
        times: dict[str, list[float]] = {label: [] for label in engines}
        tokens: dict[str, list[list[int]]] = {}
        for turn in range(rounds):
            labels = list(engines)
            for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
                tokens[label] = step(engines[label], times[label])
        if not tokens["CPU_ATTN"] == tokens["same_maths"] == tokens["torch_native"]:
            raise SystemExit(f"{name}: the engines did not generate the same tokens")
        median = {label: statistics.median(found) for label, found in times.items()}
        own = median["CPU_ATTN"]
        added = statistics.median(b - a for a, b in zip(times["CPU_ATTN"], times["same_maths"], strict=True))
        print(
            f"{name:18} {requests:2} requests  CPU_ATTN {own * 1e3:7.3f} ms  same kernels through the adapter"
            f" {median['same_maths'] * 1e3:7.3f} ms  added {added * 1e6:6.1f} us = {100 * added / own:5.2f}%"
            f"  torch_native {median['torch_native'] * 1e3:7.3f} ms",
            flush=True,
        )
        for llm in engines.values():
            llm.engine_core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=STEPS, help="steps of each engine [%(default)s]")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="which of the models")
    asked = parser.parse_args()
    attn_core.register(SameMaths, Manifest.parse(MANIFEST))
    for name in asked.models:
        for requests in (1, 8):
            measure(name, requests, asked.rounds)


if __name__ == "__main__":
    main()
