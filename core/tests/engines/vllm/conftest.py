"""Engines of vLLM in this process, over tiny random models, and what the backends inside them were asked to run."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Without vLLM there is nothing here to run: `make test-vllm` has it.
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

#: a short prompt, a loop, two with a long prefix in common (which vLLM shares within one step), a repetition, one token
PROMPTS = (
    [5, 17, 33, 99, 240, 7],
    [9, 8, 7] * 5,
    [3 + i * 7 % 200 for i in range(200)],
    [3 + i * 7 % 200 for i in range(200)] + [5, 6, 7],
    [5, 17, 33, 99, 240, 7],
    [42],
)
NEW_TOKENS = 24


@dataclass(frozen=True)
class Generated:
    """Tokens of each prompt in a first and a second pass, and how many of the second's prompt tokens were cached."""

    tokens: list[list[int]]
    again: list[list[int]]
    cached: int


@pytest.fixture(scope="session", autouse=True)
def _kernels_registered_once() -> None:
    """One process has many engines here, and vLLM 0.32 registers its CPU kernels for each.

    It cannot once numba is imported (for n-gram guesses): its walk over all modules meets objects of llvmlite whose
    ``__dict__`` is none.
    """
    from vllm.triton_utils import dispatcher

    register = dispatcher.register_kernels

    def register_new(overrides: Any) -> None:
        new = {name: kernel for name, kernel in overrides.items() if name not in dispatcher._registry}
        if new:
            register(new)

    dispatcher.register_kernels = register_new


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models, each made when it is first asked for."""
    import torch

    from .tiny import MODELS

    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(path)
        return path

    return folder


def generate(folder: Path, *, prompts: Any = PROMPTS, new_tokens: int = NEW_TOKENS, **options: Any) -> Generated:
    """An engine for this one call, greedy, in prompt chunks of up to 64 tokens."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()  # a process of vLLM serves one model; this one serves many
    defaults = {
        "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
        "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20, "seed": 0, "disable_log_stats": True,
    }  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    try:
        llm: Any = LLM(model=str(folder), **{**defaults, **options})
        first, second = (llm.generate(asked, sampling, use_tqdm=False) for _ in range(2))
        llm.llm_engine.engine_core.shutdown()
    finally:
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
    tokens, again = ([list(out.outputs[0].token_ids) for out in outs] for outs in (first, second))
    return Generated(tokens, again, sum(out.num_cached_tokens or 0 for out in second))


@pytest.fixture(scope="session")
def stock(models: Callable[[str], Path]) -> Callable[..., Generated]:
    """What vLLM's own attention generates, once for each model and options."""
    known: dict[str, Generated] = {}

    def tokens(name: str, **options: Any) -> Generated:
        key = f"{name} {sorted(options.items())}"
        if key not in known:
            known[key] = generate(models(name), **options)
        return known[key]

    return tokens


@pytest.fixture
def ours(
    models: Callable[[str], Path], ran: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Generated]:
    """What an engine generates whose ATTN_BACKEND is ``backend``."""

    def tokens(name: str, backend: str | None, **options: Any) -> Generated:
        monkeypatch.delenv("ATTN_BACKEND", raising=False)
        if backend is not None:
            monkeypatch.setenv("ATTN_BACKEND", backend)
        ran.clear()
        return generate(models(name), attention_backend="CUSTOM", **options)

    return tokens


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(backend, mode) of what ran, seen at the backends' own forwards."""
    from attn_core.runtime.torch_native.backend import TorchNativeBackend
    from attn_guest.backend import GuestBackend

    seen: set[tuple[str, str]] = set()

    def watch(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def forward(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, **rest: Any) -> Any:
            seen.add((type(self).name, batch.mode.name))
            return original(self, q, k, v, layer, batch, **rest)

        monkeypatch.setattr(cls, name, forward)

    for cls in (TorchNativeBackend, GuestBackend):
        watch(cls, "forward_extend")
        watch(cls, "forward_decode")
    return seen
