"""The demo model, real weights: the same greedy tokens as transformers' own eager attention, however it is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from attn_core.generate.request import Request
from attn_core.generate.session import Queue, ServingOptions, Session
from attn_core.generate.weights import locate

pytestmark = pytest.mark.xdist_group("smollm2")  # half a gigabyte of weights: loaded once

PROMPTS = [
    "What is the capital of France?",
    "Explain what a KV cache is in one paragraph.",
    "Write a short story about a robot that learns to paint. Include a dragon.",
]
NEW_TOKENS = 24


def silent(_what: str, _done: int, _total: int) -> None:
    return None


@pytest.fixture(scope="module")
def serve() -> Any:
    """Serve PROMPTS with these options: the session afterwards, and its requests. Weights are loaded once."""
    loaded: list[Any] = []

    def serve_(prompts: list[str] = PROMPTS, new: int = NEW_TOKENS, **options: Any) -> tuple[Session, list[Request]]:
        torch.set_num_threads(1)
        queue = Queue(ServingOptions(device="cpu", **options), silent)
        requests = [queue.add(prompt, {"max_new_tokens": new}) for prompt in prompts]
        with pytest.MonkeyPatch.context() as patch:
            if loaded:
                patch.setattr("attn_core.generate.session.load_model", lambda *args, **kwargs: loaded[0])
            session = Session(queue, silent)
        loaded[:] = [session.engine.model.model]
        assert session.engine.run()
        return session, requests

    return serve_


def tokens_of(requests: list[Request]) -> list[list[int]]:
    return [request.generated for request in requests]


@pytest.fixture(scope="module")
def eager_tokens(serve: Any) -> list[list[int]]:
    """Greedy tokens of transformers' generate() with eager attention, prompt by prompt."""
    session, _ = serve(PROMPTS[:1], new=1)
    model, queue = session.engine.model.model, session.queue
    model.set_attn_implementation("eager")
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([queue.encode(prompt, raw=False)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        stop = next((i for i, token in enumerate(new) if token in queue._stop_ids), len(new))
        tokens.append(new[:stop])
    assert [len(t) for t in tokens] == [7, NEW_TOKENS, NEW_TOKENS]
    assert isinstance(model, hf.LlamaForCausalLM)
    return tokens


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_greedy_tokens_are_those_of_eager_attention(page_size: int, serve: Any, eager_tokens: list[list[int]]) -> None:
    session, requests = serve(page_size=page_size)
    assert tokens_of(requests) == eager_tokens
    assert session.witness.by_phase() == {"prefill": ("torch_native",), "decode": ("torch_native",)}
    assert session.engine.scheduler.pool.num_in_use == 0


@pytest.mark.parametrize("budget", [16, 37])
def test_chunks_mixed_with_decodes_change_nothing(budget: int, serve: Any, eager_tokens: list[list[int]]) -> None:
    session, requests = serve(max_batch_tokens=budget)
    assert tokens_of(requests) == eager_tokens
    assert "MIXED" in {mode.name for mode in session.engine.figures.by_mode}


def test_prompts_reuse_the_beginning_they_share(serve: Any, eager_tokens: list[list[int]]) -> None:
    session, requests = serve(page_size=4)
    assert tokens_of(requests) == eager_tokens
    first, *others = (session.queue.encode(prompt, raw=False) for prompt in PROMPTS)
    shared = [
        next(i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b) // 4 * 4 for other in others
    ]
    assert [r.num_reused for r in requests] == [0, *shared]
    assert min(shared) > 20, "the model's system prompt is shared"
    computed = sum(r.num_prompt_tokens for r in requests) - sum(shared)
    assert session.engine.figures.prompt_tokens == computed


def test_a_cache_so_small_that_a_request_is_computed_again_changes_nothing(
    serve: Any, eager_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_core.generate.session.num_pages", lambda *_args: 1 + 24)
    session, requests = serve(page_size=4)
    assert tokens_of(requests) == eager_tokens
    assert sum(r.num_preemptions for r in requests) > 0
    assert session.engine.figures.peak_pages <= 24


def test_one_slot_gives_the_same_tokens_one_after_the_other(serve: Any, eager_tokens: list[list[int]]) -> None:
    _, requests = serve(max_requests=1)
    assert tokens_of(requests) == eager_tokens


def test_memory_and_start_of_the_whole_process(tmp_path: Path) -> None:
    """fp32 weights and a 64 MiB cache: less than 1.7 GB at most, less than 15 seconds of CPU to the first token."""
    locate(None, silent)  # weights are converted already
    command = [sys.executable, "-m", "attn_core", "generate", PROMPTS[0], "--max-new-tokens", "1", "--cache-mib", "64"]
    output = tmp_path / "out.json"
    env = {**os.environ, "ATTN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        process = subprocess.Popen([*command, "--device", "cpu", "--json"], stdout=file, env=env)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    document = json.loads(output.read_text())
    assert (status, document["requests"][0]["text"]) == (0, "The")
    assert used.ru_maxrss * 1024 < 1.7e9
    assert used.ru_utime + used.ru_stime < 15
