"""What the transformers adapter adds to a decode step: the same model over its own attention and cache, and over ours.

    python benchmarks/engines_transformers.py [--rounds N] [--write]

Each step decodes one token of one request of 200 tokens on one thread, in CPU time: the mean of 32 steps after 16 that
are not counted (making a cache leaves the processor's own caches cold for either way), the best of interleaved rounds.
Pages hold 16 tokens, so that two of the steps counted take a new one.
`sdpa` is transformers' own function over its DynamicCache, `attn` ours over a PagedCache. `adapter` is the same two
steps with the attention taken out of both (a backend, and a function, that give an output which is there already),
ours less theirs, as a share of transformers' step: what masks, caches, batches and calls cost more. What is left of
the difference between the steps is the backend's, here torch_native's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from attn_core.bench.results import Results, Row, device_slug
from attn_core.engines.transformers import PagedCache, register
from attn_core.testing.devices import device_name
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

BASE = {"vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
MODELS: dict[str, dict[str, Any]] = {
    "2 layers of 64": {**BASE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "12 layers of 256": {**BASE, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12},
    "SmolLM2-135M's": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
#: what `compare` gives, as rows of results
WAYS = ("transformers:sdpa", "attn", "transformers, attention taken out", "attn, attention taken out")
#: how many times the rounds of the largest: differences of microseconds need more
MORE = {"2 layers of 64": 50, "12 layers of 256": 3, "SmolLM2-135M's": 1}
PROMPT, WARM_UP, STEPS = 200, 16, 32


def step(model: Any, implementation: str, cache: Any) -> float:
    """CPU seconds of a step: the mean of STEPS after a prompt and WARM_UP others."""
    model.set_attn_implementation(implementation)
    token = torch.tensor([[7]])
    model(torch.randint(5, 250, (1, PROMPT)), past_key_values=cache)
    for _ in range(WARM_UP):
        model(token, past_key_values=cache)
    start = time.thread_time()
    for _ in range(STEPS):
        model(token, past_key_values=cache)
    return (time.thread_time() - start) / STEPS


def without_attention(model: Any) -> Any:
    """A PagedCache whose backend has nothing to do."""
    model.set_attn_implementation("attn")
    cache = PagedCache(model, max_batch_size=1, max_seq_len=PROMPT + WARM_UP + STEPS)
    outputs = {n: torch.zeros(n, *heads(model)) for n in (1, PROMPT)}
    cache.backend.init_forward_metadata = lambda batch: None  # type: ignore[method-assign]
    for name in ("forward_decode", "forward_extend"):
        setattr(cache.backend, name, lambda q, *args, **options: outputs[q.shape[0]])
    return cache


def nothing(module: Any, query: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """transformers' attention function with nothing to do."""
    if query.shape[2] not in _nothing:
        _nothing[query.shape[2]] = torch.zeros(1, query.shape[2], *heads(module))
    return _nothing[query.shape[2]], None


def heads(model: Any) -> tuple[int, int]:
    return model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads


_nothing: dict[int, torch.Tensor] = {}


@torch.inference_mode()
def compare(config: dict[str, Any], rounds: int) -> list[float]:
    """Seconds of a step: theirs, ours, and both without attention; the best of each."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()
    _nothing.clear()
    ways: list[tuple[str, Callable[[], Any]]] = [
        ("sdpa", lambda: hf.DynamicCache(config=model.config)),
        ("attn", lambda: PagedCache(model, max_batch_size=1, max_seq_len=PROMPT + WARM_UP + STEPS)),
        ("nothing", lambda: hf.DynamicCache(config=model.config)),
        ("attn", lambda: without_attention(model)),
    ]
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for i, (implementation, make) in enumerate(ways):
            model.set_attn_implementation(implementation)
            best[i] = min(best[i], step(model, implementation, make()))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of the largest model; small ones have MORE")
    parser.add_argument("--write", action="store_true", help="benchmarks/results/DEVICE/engines_transformers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register()
    hf.AttentionInterface.register("nothing", nothing)
    hf.AttentionMaskInterface.register("nothing", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    print(f"{'model':18} {'sdpa':>8} {'attn':>8} {'adapter':>8} {'share':>7}   (milliseconds of CPU for a step)")
    rows: list[Row] = []
    for name, config in MODELS.items():
        theirs, ours, their_rest, our_rest = best = compare(config, options.rounds * MORE[name])
        rows += [Row("decode step", name, way, round(1e3 * s, 4)) for way, s in zip(WAYS, best, strict=True)]
        cells = " ".join(f"{seconds * 1e3:8.3f}" for seconds in (theirs, ours, our_rest - their_rest))
        print(f"{name:18} {cells} {(our_rest - their_rest) / theirs:7.1%}")
    if options.write:
        versions = {"torch": torch.__version__, "transformers": hf.__version__, "threads": "1"}
        found = Results(device_name("cpu"), versions, tuple(rows))
        path = Path(__file__).parent / "results" / device_slug(found.device) / "engines_transformers.json"
        print(f"written to {found.write(path).relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
