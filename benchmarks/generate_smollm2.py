"""SmolLM2 through `attn generate`'s own session on a GPU: each backend's tokens beside eager attention's, and its speed
with decode steps launched one by one and replayed as CUDA graphs.

    python benchmarks/generate_smollm2.py --runs triton:float32,prefill=fa3+decode=flashinfer:bfloat16

In float32 tokens must be those of transformers' eager attention. In a narrower dtype a token is right if float32's
logits, for the same text so far, put it no further below their best than twice what eager attention is off in that
dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from attn_core.generate import session as serving
from attn_core.generate.session import Queue, ServingOptions, Session
from attn_core.runtime.batch import ForwardMode

PROMPTS = (
    "What is the capital of France?",
    "Explain what a KV cache is in one paragraph.",
    "Write a short story about a robot that learns to paint. Include a dragon.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="torch_native:float32,triton:float32,triton:bfloat16")
    parser.add_argument("--model", help="a folder or a .gguf file; the demo's model if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--speed-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for run in args.runs.split(","):
        name, _, dtype = run.rpartition(":")
        try:
            rows.append(one(name, dtype, args))
        except Exception:  # one that fails must not hide the others
            rows.append({"backend": name, "dtype": dtype, "raised": traceback.format_exc(limit=6)})
        print(json.dumps(rows[-1]), flush=True)
        if args.out:  # after each: one that takes too long must not lose the others
            args.out.mkdir(parents=True, exist_ok=True)
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "new_tokens": args.new_tokens}
            (args.out / "generate_smollm2.json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def one(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a backend, or ``prefill=X+decode=Y``, generates in ``dtype``: right or not, and tokens a second."""
    model = eager(args, dtype)
    row: dict[str, Any] = {"backend": name, "dtype": dtype}
    session, tokens = generate(name, dtype, args, model, args.new_tokens, graph=False)
    row["ran"] = {phase: list(names) for phase, names in session.witness.by_phase().items()}
    row["page_size"] = session.queue.plan.config.page_size
    row |= judged(session, tokens, model, dtype)
    if args.device == "cuda":
        _, replayed = generate(name, dtype, args, model, args.new_tokens, graph=True)
        row["replayed_tokens_are_the_same"] = replayed == tokens
        if replayed != tokens:
            row["replayed"] = judged(session, replayed, model, dtype)
        for how in (False, True):  # the second run of each, when everything has been compiled
            for _again in range(2):
                ran, _ = generate(name, dtype, args, model, args.speed_tokens, graph=how)
            decode = ran.engine.figures.by_mode[ForwardMode.DECODE]
            row["decode_ms_a_step_" + ("replayed" if how else "eager")] = 1e3 * decode.seconds / decode.steps
        row["speed_up_of_replay"] = row["decode_ms_a_step_eager"] / row["decode_ms_a_step_replayed"]
    return row


_LOADED: dict[str, Any] = {}


def eager(args: argparse.Namespace, dtype: str) -> Any:
    """The model in ``dtype``, loaded once; its weights are rounded from the same float32."""
    if dtype not in _LOADED:
        queue = Queue(ServingOptions(model=args.model, device=args.device, dtype=dtype), silent)
        _LOADED[dtype] = Session(queue, silent).engine.model.model
    return _LOADED[dtype]


def generate(
    name: str, dtype: str, args: argparse.Namespace, model: Any, new: int, graph: bool
) -> tuple[Session, list[list[int]]]:
    pairs = dict(part.split("=") for part in name.split("+")) if "=" in name else {"prefill": name, "decode": name}
    options = ServingOptions(
        model=args.model, device=args.device, dtype=dtype, backends=pairs, cuda_graph=graph, cache_mib=256
    )  # type: ignore[arg-type]
    queue = Queue(options, silent)
    requests = [queue.add(prompt, {"max_new_tokens": new}) for prompt in PROMPTS]
    load, serving.load_model = serving.load_model, lambda *_args, **_options: model
    try:
        session = Session(queue, silent)
    finally:
        serving.load_model = load
    assert session.engine.run()
    return session, [request.generated for request in requests]


@torch.inference_mode()
def judged(session: Session, tokens: list[list[int]], model: Any, dtype: str) -> dict[str, Any]:
    """How many tokens are eager attention's own, and whether those that are not are within the dtype."""
    exact, half = eager_logits(session, tokens, model, torch.float32), eager_logits(session, tokens, model, None)
    off = max(float((a - b).abs().max()) for a, b in zip(exact, half, strict=True))
    behind = [
        float((row.max(-1).values - row.gather(-1, ids[:, None])[:, 0]).max())
        for row, ids in zip(half if dtype == "float32" else exact, map(tensor, tokens), strict=True)
    ]
    same = sum(int((row.argmax(-1) == tensor(ids)).sum()) for row, ids in zip(half, tokens, strict=True))
    total = sum(map(len, tokens))
    assert total
    return {
        "tokens_of_eager": f"{same} of {total}",
        "furthest_behind_the_best_logit": max(behind),
        "eager_of_this_dtype_is_off": off,
        "right": same == total if dtype == "float32" else max(behind) <= 2 * off,
    }


def eager_logits(session: Session, tokens: list[list[int]], model: Any, dtype: torch.dtype | None) -> list[Any]:
    """Logits [new, V] float32 that eager attention gives at the place of each new token; ``dtype`` widens the model."""
    model.set_attn_implementation("eager")
    before = next(model.parameters()).dtype
    model.to(dtype or before)
    found = []
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        ids = session.queue.encode(prompt, raw=False)
        whole = tensor([*ids, *new]).to(model.device)
        logits = model(input_ids=whole[None]).logits[0, len(ids) - 1 : -1].float().cpu()
        found.append(logits)
    model.to(before)
    return found


def tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def silent(_what: str, _done: int, _total: int) -> None:
    return None


if __name__ == "__main__":
    main()
