"""Our backends inside transformers on a GPU: logits and tokens beside eager attention's, and times of decode steps.

    python benchmarks/engines_gpu.py all --out FOLDER [--seconds 30]           the times, then the checks side by side
    python benchmarks/engines_gpu.py checks NAME... --out FOLDER [--dtype D]   of these implementations, in this process
    python benchmarks/engines_gpu.py times NAME... --out FOLDER

Logits are compared over the same text: a prompt padded on the left, more of it over what is cached, a chain of guesses,
single tokens. In float32 they must be eager attention's within 1e-4, in bfloat16 no further from those of float32 than
twice what eager attention is off in bfloat16; `control` is what the feature of the model changes when it is left out.
Tokens in float32 must be eager attention's; in bfloat16 float32's logits, for the same text so far, may put none of
them further below their best than twice what eager attention is off. A backend that refuses says why.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from attn_core.engines.transformers import PagedCache, register
from attn_core.errors import AttnError
from torch import Tensor

BASE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "eos_token_id": None,
    "tie_word_embeddings": False, "head_dim": 64,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **{k: v for k, v in BASE.items() if k != "head_dim"}, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: the model, and its config without what its attention is about
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (lambda **c: hf.LlamaForCausalLM(hf.LlamaConfig(**c)), BASE, {}),
    "gpt_oss": (lambda **c: gpt_oss(**c), {**BASE, **WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2,
                "rope_parameters": ROPE, "pad_token_id": 0}, {"sinks": None}),
    "gemma2": (lambda **c: hf.Gemma2ForCausalLM(hf.Gemma2Config(**c)),
               {**BASE, **WINDOWS, "query_pre_attn_scalar": 96, "attn_logit_softcapping": 5.0},
               {"attn_logit_softcapping": None}),
    "deepseek_v3": (lambda **c: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**c)), LATENT, {}),
    "mistral": (lambda **c: hf.MistralForCausalLM(hf.MistralConfig(**c)), {**BASE, "sliding_window": 8},
                {"sliding_window": 512}),
    "gemma3": (lambda **c: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**c)),
               {**BASE, **WINDOWS, "query_pre_attn_scalar": 96}, {"sliding_window": 512}),
    "qwen3": (lambda **c: hf.Qwen3ForCausalLM(hf.Qwen3Config(**c)), BASE, {}),
}  # fmt: skip
MID = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
IMPLEMENTATIONS = ("attn", "attn-triton", "attn-fa3", "attn-flashinfer", "attn-torch_native")
#: that run latents only
LATENT_ONLY = ("attn-flashmla", "attn-flashinfer_mla")
#: whose kernels are compiled as they are met: in how many processes their checks run
COMPILED = {"attn": 3, "attn-triton": 3}
TOLERANCE, DRAFTS, NEW = 1e-4, 4, 16
#: tokens of a prompt, more of it, a chain of guesses, single ones
STEPS = (33, 9, DRAFTS, 1, 1, 1, 1)
DTYPES = ("bfloat16", "float32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gpt_oss(sinks: float | None = 2.0, **config: Any) -> Any:
    """With sinks spread by ``sinks``; None takes them out."""
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**config))
    for layer in model.model.layers:
        place = layer.self_attn.sinks
        torch.nn.init.constant_(place, -1e4) if sinks is None else torch.nn.init.normal_(place, std=sinks)
    return model


def made(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    make, config, _ = MODELS[name]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = make(**{**config, **changes})
    # what bfloat16 holds, in either dtype: the same weights
    return model.to(torch.bfloat16).to(dtype).eval()


@contextmanager
def modes_seen() -> Iterator[list[str]]:
    """The modes of the batches that caches of ours begin meanwhile."""
    seen: list[str] = []
    start = PagedCache._start

    def note(self: Any, batch: Any, *args: Any) -> Any:
        seen.append(batch.mode.name)
        return start(self, batch, *args)

    PagedCache._start = note  # type: ignore[method-assign,assignment]
    try:
        yield seen
    finally:
        PagedCache._start = start  # type: ignore[method-assign]


@torch.inference_mode()
def logits_of(model: Any, implementation: str) -> tuple[Tensor, dict[str, Any]]:
    """[T, V] float32 logits of two requests, where they have tokens, and what ran."""
    model.set_attn_implementation(implementation)
    ids = torch.randint(5, 246, (2, sum(STEPS)), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    ours = implementation.startswith("attn")
    cache: Any = hf.DynamicCache(config=model.config)
    if ours:
        cache = PagedCache(model, max_batch_size=2, max_seq_len=ids.shape[1], max_draft_tokens=DRAFTS)
    found, done = [], 0
    with modes_seen() as modes:
        for count in STEPS:
            part = slice(done, done + count)
            done += count
            out = model(ids[:, part], attention_mask=mask[:, :done], past_key_values=cache).logits
            found.append(out[mask[:, part].bool()].float())
    return torch.cat(found), {"modes": modes, **(ran(cache) if ours else {})}


def ran(cache: Any) -> dict[str, Any]:
    return {"ran": {phase: chosen.backend.name for phase, chosen in cache.plan.phases.items()}}


def compared(name: str, implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """How far logits are from float32's eager ones."""
    model = made(name, dtype)
    got, how = logits_of(model, implementation)
    exact, _ = logits_of(made(name, torch.float32), "eager")
    row: dict[str, Any] = {**how, "off": float((got - exact).abs().max()), "logits_reach": float(exact.abs().max())}
    if changes := MODELS[name][2]:
        row["control"] = float((logits_of(made(name, torch.float32, **changes), "eager")[0] - exact).abs().max())
    row["allowed"] = TOLERANCE if dtype is torch.float32 else 2 * eager_off(name)
    return {**row, "right": row["off"] <= row["allowed"] and row.get("control", 1e9) > row["allowed"]}


def eager_off(name: str) -> float:
    """How far eager attention in bfloat16 is from float32."""
    half, exact = (logits_of(made(name, dtype), "eager")[0] for dtype in (torch.bfloat16, torch.float32))
    return float((half - exact).abs().max())


#: most tokens there are, so that what is generated has been seen before
PROMPT = torch.randperm(241, generator=torch.Generator().manual_seed(2))[:200].add(5).tolist()


def generated(implementation: str, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """``model.generate``: greedy tokens, and which phases ran."""
    model = made("llama", dtype)
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    ids = torch.tensor([PROMPT], device=DEVICE)
    with modes_seen() as modes:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    counted = {mode: modes.count(mode) for mode in dict.fromkeys(modes)}
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    return {**judged([tokens], [PROMPT], dtype), "modes": counted, **ran(out.past_key_values)}


def looked_up(implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """Prompt lookup: its guesses are verify steps."""
    row = generated(implementation, dtype, prompt_lookup_num_tokens=DRAFTS, max_matching_ngram_size=1)
    return {**row, "right": row["right"] and row["modes"].get("TARGET_VERIFY", 0) > 0}


def batched(implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """``model.generate_batch``: transformers' continuous batching, over its pages."""
    model = made("llama", dtype)
    model.set_attn_implementation(implementation)
    prompts = [PROMPT[:40], PROMPT[:5], PROMPT[60:85]]
    with torch.inference_mode():
        model(torch.tensor([PROMPT[:4]], device=DEVICE), use_cache=False)  # a refusal would be lost in its thread
    results = model.generate_batch(
        inputs=prompts,
        generation_config=hf.GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=hf.ContinuousBatchingConfig(
            page_size=16, num_blocks=64, max_batch_tokens=16, use_cuda_graph=False, auto_switch_to_flash=False
        ),
        progress_bar=False,
    )
    if errors := [result.error for result in results.values() if result.error]:
        raise RuntimeError(errors[0])
    return judged([result.generated_tokens for result in results.values()], prompts, dtype)


@torch.inference_mode()
def judged(tokens: list[list[int]], prompts: list[list[int]], dtype: torch.dtype) -> dict[str, Any]:
    """Whether tokens are eager attention's, or as near to its best ones as the dtype allows."""
    half, exact = made("llama", dtype), made("llama", torch.float32)
    same, off, behind = 0, 0.0, 0.0
    for prompt, new in zip(prompts, tokens, strict=True):
        whole = torch.tensor([[*prompt, *new]], device=DEVICE)
        rows = []
        for model in (half, exact):
            model.set_attn_implementation("eager")
            rows.append(model(whole).logits[0, len(prompt) - 1 : -1].float())
        chosen = whole[0, len(prompt) :, None]
        same += int((rows[0].argmax(-1) == chosen[:, 0]).sum())
        off = max(off, float((rows[0] - rows[1]).abs().max()))
        behind = max(behind, float((rows[1].max(-1).values - rows[1].gather(-1, chosen)[:, 0]).max()))
    total = sum(map(len, tokens))
    right = total == NEW * len(prompts) and (same == total if dtype is torch.float32 else behind <= 2 * off)
    return {"eagers_tokens": f"{same} of {total}", "behind": behind, "eager_off": off, "right": right}


def checks(implementation: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is looked at, the most telling first."""
    if implementation not in LATENT_ONLY:
        yield "generate", lambda: generated(implementation, dtype)
        yield "prompt lookup", lambda: looked_up(implementation, dtype)
        yield "generate_batch", lambda: batched(implementation, dtype)
    for name in ["deepseek_v3"] if implementation in LATENT_ONLY else MODELS:
        yield f"logits of {name}", functools.partial(compared, name, implementation, dtype)


def run_checks(implementation: str, dtype: str, out: Path, seconds: float, part: tuple[int, int]) -> None:
    """Every ``part[1]``-th check from ``part[0]`` on."""
    begun, rows = time.monotonic(), []
    path = out / f"checks-{implementation}-{dtype}-{part[0]}.json"
    for what, check in itertools.islice(checks(implementation, getattr(torch, dtype)), part[0], None, part[1]):
        label: dict[str, Any] = {"implementation": implementation, "dtype": dtype, "check": what}
        if time.monotonic() - begun > seconds:
            rows.append({**label, "not_run": "out of time"})
            continue
        start = time.monotonic()
        try:
            row = {**label, **check()}
        except AttnError as error:
            row = {**label, "refused": " ".join(str(error).split())[:600]}
        except Exception:  # one that fails must not hide the others
            row = {**label, "right": False, "raised": traceback.format_exc(limit=-4)}
        rows.append({**row, "seconds": round(time.monotonic() - start, 2)})
        path.write_text(json.dumps(rows, indent=1))
    path.write_text(json.dumps(rows, indent=1))


# -- times


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def times(implementations: list[str], batch_size: int, context: int, rounds: int, config: dict[str, Any]) -> Any:
    """Milliseconds of a decode step of each: medians over rounds that take them in changing turns."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**config))
    model = model.to(torch.bfloat16).eval()
    prompt = torch.randint(5, config["vocab_size"], (batch_size, context), device=DEVICE)
    token, caches, notes = prompt[:, :1], {}, {}
    for name in implementations:
        try:
            model.set_attn_implementation(name)
            room: dict[str, Any] = {"max_batch_size": batch_size, "max_seq_len": context + rounds + 8}
            cache = PagedCache(model, **room) if name.startswith("attn") else hf.DynamicCache(config=model.config)
            last = model(prompt, past_key_values=cache, logits_to_keep=1).logits
            for _ in range(4):
                last = model(token, past_key_values=cache).logits
            caches[name] = cache, last.float()
        except Exception as error:  # what cannot run is no reason to time nothing
            notes[name] = " ".join(str(error).split())[:300]
    took: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds):
        order = list(caches)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            model.set_attn_implementation(name)
            synchronize()
            start = time.perf_counter()
            model(token, past_key_values=caches[name][0])
            synchronize()
            took[name].append(time.perf_counter() - start)
    first = caches["sdpa"][1]
    return [
        {
            "batch": batch_size, "context": context, "implementation": name,
            **({"not_run": notes[name]} if name in notes else {
                "ms": 1e3 * statistics.median(took[name]),
                "err_to_sdpa": float((caches[name][1] - first).norm() / first.norm()),
                **(ran(caches[name][0]) if name.startswith("attn") else {}),
            }),
        }
        for name in implementations
    ]  # fmt: skip


def run_times(implementations: list[str], out: Path) -> None:
    rows: list[Any] = []
    small = {**MID, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    small["num_key_value_heads"] = 2
    shapes = ((1, 1024), (32, 2048)) if DEVICE == "cuda" else ((1, 64), (3, 96))
    for batch_size, context in shapes:
        rows += times(implementations, batch_size, context, 40, MID if DEVICE == "cuda" else small)
        about = {"config": MID if DEVICE == "cuda" else small, "dtype": "bfloat16", "rows": rows}
        (out / "times.json").write_text(json.dumps(about, indent=1))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def run_all(out: Path, seconds: float) -> None:
    """The times, alone; then the checks side by side, in processes of their own; then one file of it."""
    me = [sys.executable, __file__]
    more = ["--out", str(out), "--seconds", str(seconds)]
    subprocess.run([*me, "times", "sdpa", "flash_attention_3", *IMPLEMENTATIONS, "--out", str(out)], check=False)
    report(out)
    running = [
        subprocess.Popen([*me, "checks", name, "--dtype", dtype, "--part", f"{part}/{COMPILED.get(name, 1)}", *more])
        for name in (*IMPLEMENTATIONS, *LATENT_ONLY)
        for dtype in DTYPES
        for part in range(COMPILED.get(name, 1))
    ]
    for process in running:
        try:
            process.wait(timeout=seconds + 20)
        except subprocess.TimeoutExpired:
            process.kill()
    report(out)


def report(out: Path) -> None:
    rows = [row for path in sorted(out.glob("checks-*.json")) for row in json.loads(path.read_text())]
    timed = json.loads((out / "times.json").read_text()) if (out / "times.json").exists() else None
    about = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", "torch": torch.__version__,
        "transformers": hf.__version__, "checks": rows, "times": timed,
    }  # fmt: skip
    (out / "engines_transformers_gpu.json").write_text(json.dumps(about, indent=1) + "\n")
    for row in rows:
        verdict = "right" if row.get("right") else "WRONG" if "right" in row else "refused" if "refused" in row else "-"
        more = {k: row[k] for k in ("off", "allowed", "control", "eagers_tokens", "ran", "not_run") if k in row}
        what = (row.get("raised") or row.get("refused", "")).strip().splitlines()[-1:]
        print(f"{row['implementation']:20} {row['dtype']:9} {row['check']:22} {verdict:8} {more} {what}"[:330])
    for row in (timed or {}).get("rows", []):
        print({k: v for k, v in row.items() if k != "not_run"}, row.get("not_run", "")[:120])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", "checks", "times", "report"))
    parser.add_argument("names", nargs="*", default=list(IMPLEMENTATIONS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of the checks [both]")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th check, from the I-th on")
    parser.add_argument("--seconds", type=float, default=30)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    register()
    if given.what == "all":
        run_all(given.out, given.seconds)
    elif given.what == "checks":
        for name, dtype in itertools.product(given.names, given.dtype or DTYPES):
            first, step = map(int, given.part.split("/"))
            run_checks(name, dtype, given.out, given.seconds, (first, step))
    elif given.what == "times":
        run_times(given.names, given.out)
    else:
        report(given.out)


if __name__ == "__main__":
    main()
