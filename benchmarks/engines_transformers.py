"""What the transformers adapter adds to a decode step: transformers' own attention, and its kernels behind a plan.

    python benchmarks/engines_transformers.py [--rounds N] [--write]

`sdpa` is transformers' own function over its DynamicCache. `same kernels` is a backend of ours that calls the two
kernels which those call, torch.cat and scaled_dot_product_attention, on tensors of the same shapes: what is left
between the two is the adapter, with its masks, pages, batches and the plan. `torch_native` is for comparison: there the
kernels differ.

One request decodes from 209 to 465 tokens on one thread. The ways take turns, in an order that is drawn, of 16 steps
each, in which one page of 16 is filled; time is the CPU's for this thread, so that other processes count for little.
`added` is the median over the turns of the difference within a turn.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from pathlib import Path
from typing import Any

import attn_core
import torch
import transformers as hf
from attn_core import AttentionBackend, AttentionLayer, ForwardBatch
from attn_core.bench.results import Results, Row, device_slug
from attn_core.engines.transformers import PagedCache, register
from attn_core.testing.devices import device_name
from engine_models import llamas, manifest
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MODELS = llamas("2 layers of 64", "12 layers of 256", "SmolLM2-135M's")
#: the ways, and their attn_implementation
WAYS = {"sdpa": "sdpa", "same kernels": "attn-same_kernels", "torch_native": "attn-torch_native"}
#: how many times the rounds of the largest: differences of microseconds need more
MORE = {"2 layers of 64": 30, "12 layers of 256": 4, "SmolLM2-135M's": 1}
PROMPT, WARM_UP, STEPS, TURNS = 200, 9, 16, 16


class SameKernels(AttentionBackend):
    """Of one request: the kernels of transformers' `sdpa` and DynamicCache, over keys that are joined as those are."""

    name = "same_kernels"

    def __init__(self, config: Any, kv_cache: Any) -> None:
        super().__init__(config, kv_cache)
        kind = config.layers[0]
        self._heads, self._group, self._width = (
            kind.num_kv_heads,
            kind.num_q_heads // kind.num_kv_heads,
            kind.v_head_dim,
        )
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Nothing is to be prepared."""

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor:
        """The prompt, in one pass."""
        assert k is not None
        assert v is not None
        keys, values = (x.transpose(0, 1)[None].contiguous() for x in (k, v))
        self._keys[layer.layer_id], self._values[layer.layer_id] = keys, values
        queries = q.transpose(0, 1)[None]
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=layer.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor:
        assert k is not None
        assert v is not None
        i, heads, width = layer.layer_id, self._heads, self._width
        keys = self._keys[i] = torch.cat([self._keys[i], k.view(1, heads, 1, width)], dim=-2)
        values = self._values[i] = torch.cat([self._values[i], v.view(1, heads, 1, width)], dim=-2)
        queries = q.view(1, heads, self._group, width)  # of one KV head each, as transformers packs them
        return scaled_dot_product_attention(queries, keys, values, scale=layer.scale).view(1, -1, width)


def twins(config: dict[str, Any]) -> dict[str, Any]:
    """The same weights under each way's implementation."""
    torch.manual_seed(0)
    models: dict[str, Any] = {}
    for way, implementation in WAYS.items():
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**config))
        model.eval()
        if models:
            model.load_state_dict(models["sdpa"].state_dict(), assign=True)
        model.set_attn_implementation(implementation)
        models[way] = model
    return models


@torch.inference_mode()
def compare(config: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a step of each way, turn by turn. Raises SystemExit if their logits differ."""
    models = twins(config)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    prompt, token = torch.randint(5, 250, (1, PROMPT)), torch.tensor([[7]])
    room: dict[str, Any] = {"max_batch_size": 1, "max_seq_len": PROMPT + WARM_UP + STEPS * TURNS}
    for _ in range(rounds):
        caches: dict[str, Any] = {
            way: hf.DynamicCache(config=model.config) if way == "sdpa" else PagedCache(model, **room)
            for way, model in models.items()
        }
        logits: dict[str, Tensor] = {}
        for way, model in models.items():
            model(prompt, past_key_values=caches[way])
            for _ in range(WARM_UP):
                model(token, past_key_values=caches[way])
        for _ in range(TURNS):
            for way in random.sample(list(WAYS), len(WAYS)):
                model, cache = models[way], caches[way]
                start = time.thread_time()
                for _ in range(STEPS):
                    logits[way] = model(token, past_key_values=cache).logits
                found[way].append((time.thread_time() - start) / STEPS)
        off = max(float((logits[way] - logits["sdpa"]).abs().max()) for way in WAYS)
        if off > 1e-4:
            raise SystemExit(f"logits differ by {off}")
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="of the largest model; small ones have MORE")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="which of the models")
    parser.add_argument("--write", action="store_true", help="benchmarks/results/DEVICE/engines_transformers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    gc.disable()  # between rounds only
    attn_core.register(SameKernels, manifest(SameKernels.name, "transformers' kernels", page_sizes='"any"'))
    register()
    print(
        f"{'model':18} {'sdpa':>8} {'same':>8} {'native':>8} {'added':>8} {'share':>7}   (milliseconds of CPU a step)"
    )
    rows: list[Row] = []
    for name in options.models:
        found = compare(MODELS[name], options.rounds * MORE[name])
        median = {way: statistics.median(times) for way, times in found.items()}
        added = statistics.median(b - a for a, b in zip(found["sdpa"], found["same kernels"], strict=True))
        share = f"{added / median['sdpa']:.1%} of sdpa's step, the median of {len(found['sdpa'])} turns"
        rows += [Row("decode step", name, way, round(1e3 * s, 4)) for way, s in median.items()]
        rows.append(Row("decode step", name, "added by the adapter", round(1e3 * added, 4), note=share))
        cells = " ".join(f"{1e3 * seconds:8.3f}" for seconds in (*median.values(), added))
        print(f"{name:18} {cells} {added / median['sdpa']:7.1%}", flush=True)
    if options.write:
        versions = {"torch": torch.__version__, "transformers": hf.__version__, "threads": "1"}
        results = Results(device_name("cpu"), versions, tuple(rows))
        path = Path(__file__).parent / "results" / device_slug(results.device) / "engines_transformers.json"
        print(f"written to {results.write(path).relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
