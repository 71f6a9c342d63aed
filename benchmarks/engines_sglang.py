"""What the SGLang adapter adds to a decode step: SGLang's torch_native attention, and its maths behind a plan.

    make bench-sglang        (or: python benchmarks/engines_sglang.py [--rounds N] [--write] as that target calls it)

A model runner of SGLang's, loaded as its own benchmark of one batch loads it, decodes batches of the same prompts with
three attention backends in turn, over the same pool: `torch_native`, SGLang's; `same maths`, the adapter with a backend
of ours that calls the very function that SGLang's calls, on the same slots; and `attn:torch_native`, where the kernels
differ. What is left between the first two is the adapter. A step is SGLang's own: batch, model and sampling. The ways
take turns of 16 steps in an order that is drawn; time is the CPU's for this thread. `added` is the median over the
turns of the difference within a turn. All must generate the same tokens.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", SGLANG_USE_CPU_ENGINE="1", OMP_NUM_THREADS="1")

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attn_core
import torch
import transformers as hf
from attn_core import AttentionBackend, AttentionLayer, ForwardBatch
from attn_core.bench.results import Results, Row, device_slug
from attn_core.engines.sglang.backend import SGLangBackend
from attn_core.testing.devices import device_name
from engine_models import llamas, manifest
from sglang.benchmark import one_batch
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.server_args import PortArgs, ServerArgs
from torch import Tensor

MODELS = llamas("2 layers of 64", "12 layers of 256")
WAYS = ("torch_native", "same maths", "attn:torch_native")
PROMPT, STEPS, TURNS = 100, 16, 16


class SameMaths(AttentionBackend):
    """What SGLang's torch_native calls, over pages of one token, which are its slots."""

    name = "same_maths"

    def __init__(self, config: Any, kv_cache: Any) -> None:
        super().__init__(config, kv_cache)
        self._rows = {i: (kv_cache.k(i).squeeze(1), kv_cache.v(i).squeeze(1)) for i in kv_cache.layer_ids}
        self._requests = torch.arange(64)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Nothing is to be prepared."""

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor:
        keys, values = self._write(k, v, layer, batch)
        out, new = torch.empty_like(q), batch.query_start_loc.diff()
        TorchNativeAttnBackend._run_sdpa_forward_extend(
            self, q, out, keys, values, batch.page_table, self._requests[: batch.batch_size], batch.seq_lens,
            batch.seq_lens - new, new, scaling=layer.scale, enable_gqa=True, causal=True,
        )  # fmt: skip
        return out

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor:
        keys, values = self._write(k, v, layer, batch)
        out = torch.empty_like(q)
        TorchNativeAttnBackend._run_sdpa_forward_decode(
            self, q, out, keys, values, batch.page_table, self._requests[: batch.batch_size], batch.seq_lens,
            scaling=layer.scale, enable_gqa=True,
        )  # fmt: skip
        return out

    def _write(self, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch) -> Any:
        rows = self._rows[layer.layer_id]
        for place, new in zip(rows, (k, v), strict=True):
            place[batch.slot_mapping] = new
        return rows


def load(folder: str) -> Any:
    """A model runner, as sglang.benchmark.one_batch makes it, without a tokenizer."""
    asked = ServerArgs(
        model_path=folder, device="cpu", dtype="float32", attention_backend="torch_native", page_size=1,
        disable_cuda_graph=True, skip_tokenizer_init=True, max_total_tokens=16384, log_level="error",
    )  # fmt: skip
    ports = PortArgs.init_new(asked)
    ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(asked, tp_rank=0, pp_rank=0), gpu_id=0)
    one_batch.publish(asked, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    model_config = one_batch.ModelConfig.from_server_args(asked)
    bootstrap.init_parallel_runtime(server_args=asked, device="cpu", dist_port=ports.nccl_port)
    bootstrap.init_layer_runtime(model_config=model_config)
    runner = ModelRunner(
        model_config=model_config, mem_fraction_static=0.5, gpu_id=0, nccl_port=ports.nccl_port, server_args=asked
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def backends(runner: Any) -> dict[str, Any]:
    """The attention backends of ``runner``: its own, and ours."""
    made = {"torch_native": runner.attn_backend}
    for way, backend in (("same maths", "same_maths"), ("attn:torch_native", "torch_native")):
        runner.prefill_attention_backend_str = runner.decode_attention_backend_str = f"attn-{backend}"
        made[way] = SGLangBackend(backend, runner)
    return made


def requests(count: int) -> list[Any]:
    sampling = one_batch.SamplingParams(temperature=0, max_new_tokens=STEPS * TURNS + 8)
    made = []
    for i in range(count):
        ids = array("q", [(7 * i + j) % 200 + 3 for j in range(PROMPT + i)])
        one = one_batch.Req(rid=i, origin_input_text="", origin_input_ids=ids, sampling_params=sampling)
        one.full_untruncated_fill_ids = one.origin_input_ids
        one.logprob_start_len, one.extend_end = -1, len(ids)
        made.append(one)
    return made


@torch.inference_mode()
def compare(runner: Any, count: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a step of each way, turn by turn. Raises SystemExit if their tokens differ."""
    ways = backends(runner)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        states: dict[str, tuple[Any, Any]] = {}
        tokens: dict[str, list[Any]] = {way: [] for way in WAYS}
        for way in random.sample(WAYS, len(WAYS)):
            runner.attn_backend = runner.decode_attn_backend = ways[way]
            last, _, batch = one_batch.extend(requests(count), runner)
            states[way] = last, batch
        for _ in range(TURNS):
            for way in random.sample(WAYS, len(WAYS)):
                runner.attn_backend = runner.decode_attn_backend = ways[way]
                last, batch = states[way]
                start = time.thread_time()
                for _ in range(STEPS):
                    last, _ = one_batch.decode(last, batch, runner)
                found[way].append((time.thread_time() - start) / STEPS)
                states[way] = last, batch
                tokens[way].append(last.tolist())
        if not tokens["torch_native"] == tokens["same maths"] == tokens["attn:torch_native"]:
            raise SystemExit("the ways did not generate the same tokens")
        gc.collect()
    return found


def measure(name: str, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**MODELS[name], tie_word_embeddings=False, eos_token_id=0))
        model.save_pretrained(folder)
        runner = load(folder)
    rows = []
    for count in (1, 8):
        found = compare(runner, count, rounds)
        median = {way: statistics.median(times) for way, times in found.items()}
        own = median["torch_native"]
        added = statistics.median(b - a for a, b in zip(found["torch_native"], found["same maths"], strict=True))
        shape = f"{name}, {count} request{'s' if count > 1 else ''}"
        share = f"{added / own:.1%} of SGLang's own step, the median of {len(found['torch_native'])} turns"
        rows += [Row("decode step", shape, way, round(1e3 * s, 4)) for way, s in median.items()]
        rows.append(Row("decode step", shape, "added by the adapter", round(1e3 * added, 4), note=share))
        cells = " ".join(f"{1e3 * seconds:8.3f}" for seconds in (*median.values(), added))
        print(f"{shape:30} {cells} {added / own:7.1%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="benchmarks/results/DEVICE/engines_sglang.json")
    parser.add_argument("--model", choices=MODELS, help="this one, its rows into --rows; SGLang takes one in a process")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        torch.set_num_threads(1)
        random.seed(0)
        gc.disable()  # between rounds only
        attn_core.register(SameMaths, manifest(SameMaths.name, "SGLang's torch_native attention", page_sizes="[1]"))
        options.rows.write_text(json.dumps([asdict(row) for row in measure(options.model, options.rounds)]))
        return
    heads = " ".join(f"{head:>8}" for head in ("SGLang", "same", "native", "added"))
    print(f"{'model':30} {heads} {'share':>7}   (milliseconds of CPU for a step)", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = Path(folder) / "rows.json"
            command = [sys.executable, __file__, "--model", name, "--rounds", str(options.rounds), "--rows", str(path)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows += [Row(**row) for row in json.loads(path.read_text())]
    if options.write:
        versions = {"torch": torch.__version__, "sglang": version("sglang"), "threads": "1"}
        results = Results(device_name("cpu"), versions, tuple(rows))
        path = Path(__file__).parent / "results" / device_slug(results.device) / "engines_sglang.json"
        print(f"written to {results.write(path).relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
