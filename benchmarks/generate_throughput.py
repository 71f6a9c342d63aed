"""Tokens per second of the engine of `attn generate` with each backend, on random weights: the whole loop, no kernel.

    python benchmarks/generate_throughput.py --device cuda --size 1b --backends auto,torch_native,fa3 --cuda-graph

Every backend gets the same prompts; its greedy tokens are compared with those of the first one. Prints a table and
writes JSON to the folder of --out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from attn_core.errors import AttnError
from attn_core.generate.decode_graphs import DecodeGraphs
from attn_core.generate.engine import STEP_NAMES, Engine
from attn_core.generate.model import PagedModel
from attn_core.generate.page_pool import PagePool
from attn_core.generate.request import Request
from attn_core.generate.sampling import SamplingParams
from attn_core.generate.scheduler import Scheduler
from attn_core.generate.session import allocate, pick_device
from attn_core.planning.config import AttentionConfig
from attn_core.planning.plan import plan
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import TORCH_DTYPES
from attn_core.runtime.threads import set_threads
from attn_core.runtime.witness import Witness

#: hidden, intermediate, layers, query heads, KV heads, head width
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 16),
    "135m": (576, 1536, 30, 9, 3, 64),
    "1b": (2048, 8192, 16, 32, 8, 64),
    "8b": (4096, 14336, 32, 32, 8, 128),
}


def main() -> None:
    args = arguments()
    set_threads()
    device, system = pick_device(args.device)
    model = random_llama(args.size, args.dtype, device)
    prompts = random_prompts(args.requests, args.prompt_tokens)
    results: list[dict[str, Any]] = []
    for name in args.backends.split(","):
        try:
            result = run(model, name, prompts, args, device, system)
        except Exception as error:  # one backend that fails must not hide the others
            reason = str(error) if isinstance(error, AttnError) else traceback.format_exc()
            results.append({"backend": name, "failed": reason})
            print(f"{name}: failed\n{reason}\n", flush=True)
            continue
        first = next((r for r in results if "tokens" in r), result)
        result["same_tokens"] = share_of_same(result["tokens"], first["tokens"])
        results.append(result)
        print(describe(result), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        kept = [{key: value for key, value in result.items() if key != "tokens"} for result in results]
        about = {**vars(args), "out": str(args.out), "torch": torch.__version__, "device_name": device_name(device)}
        (args.out / "generate_throughput.json").write_text(json.dumps({**about, "results": kept}, indent=2) + "\n")


def share_of_same(some: list[list[int]], others: list[list[int]]) -> float:
    pairs = [pair for x, y in zip(some, others, strict=True) for pair in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--backends", default="auto")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def random_llama(size: str, dtype: str, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads, width = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, head_dim=width,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(TORCH_DTYPES[dtype]).eval()


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Lengths from half to the whole of ``length``, so that the batch is ragged."""
    drawn = random.Random(0)
    return [[drawn.randrange(32000) for _ in range(drawn.randint(length // 2, length))] for _ in range(count)]


def run(
    model: Any, backend: str, prompts: list[list[int]], args: argparse.Namespace, device: str, system: Any
) -> dict[str, Any]:
    config = AttentionConfig.from_hf(
        model.config.to_dict(), dtype=args.dtype, page_size=args.page_size, cuda_graph=args.cuda_graph
    )
    made = plan(config, backend, system=system, phases=("prefill", "decode"))
    page_size = made.config.page_size
    assert page_size is not None
    longest = max(map(len, prompts)) + args.new_tokens
    pool = PagePool(2 + len(prompts) * -(-longest // page_size), page_size)
    cache = allocate(made.config, pool.num_pages + 1, device)
    witness = Witness(build(made, cache))
    paged = PagedModel(model, made.config, witness.backend)
    graphs = DecodeGraphs(paged, max_batch_size=len(prompts), max_seq_len=longest) if args.cuda_graph else None
    scheduler = Scheduler(pool, max_requests=len(prompts), max_batch_tokens=args.max_batch_tokens)
    sampling = SamplingParams(max_new_tokens=args.new_tokens)
    for warm in (True, False):
        requests = [Request(i, list(tokens), sampling) for i, tokens in enumerate(prompts if not warm else prompts[:2])]
        scheduler.pool = PagePool(pool.num_pages + 1, page_size)
        engine = Engine(paged, scheduler, graphs)
        for request in requests:
            scheduler.add(request)
        began = time.perf_counter()
        engine.run()
        seconds = time.perf_counter() - began
    steps = {
        STEP_NAMES[mode]: {"tokens_per_second": f.tokens_per_second, "steps": f.steps, "seconds": f.seconds}
        for mode, f in engine.figures.by_mode.items()
    }
    return {
        "backend": backend,
        "ran": {phase: list(names) for phase, names in witness.by_phase().items()},
        "page_size": page_size,
        "seconds": seconds,
        "steps": steps,
        "tokens": [request.generated for request in requests],
    }


def describe(result: dict[str, Any]) -> str:
    ran = ", ".join(f"{phase}: {' and '.join(names)}" for phase, names in result["ran"].items())
    steps = "  ".join(
        f"{name} {of['tokens_per_second']:.0f} tok/s ({of['steps']} steps)" for name, of in result["steps"].items()
    )
    return (
        f"{result['backend']:<16} {result['seconds']:.2f} s  {steps}  same tokens {result['same_tokens']:.0%}  [{ran}]"
    )


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    main()
