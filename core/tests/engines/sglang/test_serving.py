"""SGLang serves through our backends: the tokens of its own attention, or of transformers where it has none."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.generate.weights import locate
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
SHARED = list(range(20, 60))
#: longer than a chunk of prefill and than gemma3's window; two that share a prefix; one that is short
PROMPTS = [list(range(60, 130)), [*SHARED, 7, 8, 9], [*SHARED, 11], [5, 6, 7]]


@torch.inference_mode()
def eager(model: Path, prompts: list[list[int]], new: int = 12, **config: Any) -> tuple[list[list[int]], torch.Tensor]:
    """transformers' greedy tokens, and their log-probabilities."""
    own = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32, **config)
    tokens, logprobs = [], []
    for prompt in prompts:
        out = own.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        chosen = out.sequences[0, len(prompt) :]
        scores = torch.cat(out.logits).log_softmax(-1)
        tokens.append(chosen.tolist())
        logprobs.append(scores[torch.arange(new), chosen])
    return tokens, torch.stack(logprobs)


def test_pages_chunks_mixed_batches_and_cached_prefixes(folder: Callable[[str], Path], serve: Any) -> None:
    model = folder("llama")
    wanted = serve(model, PROMPTS, rounds=2, attention_backend="torch_native")
    got = serve(
        model, PROMPTS, rounds=2, attention_backend="attn", page_size=16, enable_mixed_chunk=True,
        disable_overlap_schedule=False,
    )  # fmt: skip
    assert got.planned == ["prefill by torch_native (preferred for cpu)", "decode by torch_native (preferred for cpu)"]
    for index in (0, 1):
        assert got.tokens(index) == wanted.tokens(index)
        assert (got.logprobs(index) - wanted.logprobs(index)).abs().max() < TOLERANCE
    assert [one["cached"] for one in got.rounds[1]] == [64, 32, 32, 0], "whole pages of the prompts of the first round"


def test_guesses_are_verified(folder: Callable[[str], Path], serve: Any) -> None:
    """N-grams of what was generated before, as trees: in the second round they are right."""
    model = folder("llama")
    wanted = serve(model, PROMPTS, rounds=2, attention_backend="torch_native")
    got = serve(
        model, PROMPTS, rounds=2, attention_backend="attn-torch_native", speculative_algorithm="NGRAM",
        speculative_num_draft_tokens=4,
    )  # fmt: skip
    assert got.planned == [f"{phase} by torch_native (named)" for phase in ("prefill", "decode", "verify")]
    for index in (0, 1):
        assert got.tokens(index) == wanted.tokens(index)
        assert (got.logprobs(index) - wanted.logprobs(index)).abs().max() < TOLERANCE
    assert all(one["guessed"] >= 6 for one in got.rounds[1]), "half of the tokens were guessed"


@pytest.mark.parametrize(("name", "page_size"), [("gemma3", 4), ("deepseek_v3", 1)])
def test_windows_and_latent_caches(name: str, page_size: int, folder: Callable[[str], Path], serve: Any) -> None:
    model = folder(name)
    tokens, logprobs = eager(model, PROMPTS)
    got = serve(model, PROMPTS, attention_backend="attn-torch_native", page_size=page_size)
    assert got.tokens() == tokens
    assert (got.logprobs() - logprobs).abs().max() < TOLERANCE
    if name == "gemma3":
        without = eager(model, PROMPTS, sliding_window=512)[1]
        assert (got.logprobs() - without).abs().max() > 1e-2, "a window that is forgotten would be seen"


REAL_PROMPTS = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2], [504, 3575, 282, 4649, 314]]


@pytest.fixture(scope="module")
def real(serve: Any) -> tuple[Path, Any]:
    """SmolLM2, and what SGLang's torch_native generates from REAL_PROMPTS."""
    model = locate(None, lambda *args: None).folder
    return model, serve(model, REAL_PROMPTS, attention_backend="torch_native", new=16)


@pytest.mark.xdist_group("real")
def test_a_real_model_with_sglangs_own_prefill_and_our_decode(real: tuple[Path, Any], serve: Any) -> None:
    model, wanted = real
    got = serve(
        model, REAL_PROMPTS, prefill_attention_backend="torch_native", decode_attention_backend="attn-torch_native",
        new=16,
    )  # fmt: skip
    assert got.planned == ["decode by torch_native (named)"]
    assert got.tokens() == wanted.tokens()
    assert (got.logprobs() - wanted.logprobs()).abs().max() < 1e-3


@pytest.mark.xdist_group("real")
def test_a_server(real: tuple[Path, Any], tmp_path: Path) -> None:
    """What ``sglang serve`` starts, asked over HTTP: the tokens of the engine with SGLang's own attention."""
    model, wanted = real
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log.txt"
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--attention-backend", "attn",
        "--device", "cpu", "--dtype", "float32", "--disable-cuda-graph", "--max-total-tokens", "4096",
        "--page-size", "16", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not answers(f"{url}/health_generate"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        got = ask(f"{url}/generate", {"input_ids": REAL_PROMPTS, "sampling_params": sampling})
        assert [one["output_ids"] for one in got] == wanted.tokens()
        question = {"model": "it", "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        assert ask(f"{url}/v1/completions", question)["choices"][0]["text"] == " Paris."
        assert log.read_text().count("attn: decode by torch_native (preferred for cpu)") == 1
    finally:
        server.terminate()
        server.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def test_a_backend_that_cannot_is_refused_with_its_reasons(folder: Callable[[str], Path], serve: Any) -> None:
    got = serve(folder("llama"), PROMPTS, attention_backend="attn-flashinfer")
    assert not got.rounds
    assert "backend 'flashinfer' cannot run prefill" in got.log
    assert "next: --attention-backend attn takes what can" in got.log
