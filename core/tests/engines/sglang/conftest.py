"""SGLang on the CPU for the tests: engines in processes of their own, and tiny models in folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from core.tests.engines.tiny_models import BASE, LATENT, LAYER_TYPES, TEXT, YARN

# Without SGLang there is nothing here to run: `make test-sglang` has it.
collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]

#: what SGLang reads in a config and transformers no longer writes
OLD_FIELDS = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
UNTIED: dict[str, Any] = {"eos_token_id": 0, "tie_word_embeddings": False}


def gemma3() -> Any:
    """SGLang ties its embeddings whatever the config says; small ones leave more than a token's own logit."""
    model = hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**TEXT, query_pre_attn_scalar=24, sliding_window=8, layer_types=LAYER_TYPES)
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**BASE, **UNTIED})),
    "gemma3": gemma3,
    # dense layers only: SGLang's experts need kernels that are not here
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**{**LATENT, **UNTIED, "first_k_dense_replace": 2}, rope_parameters=YARN)
    ),
}


@dataclass
class Run:
    """What an engine answered, round by round, and what it logged."""

    rounds: list[list[dict[str, Any]]]
    log: str

    def tokens(self, index: int = 0) -> list[list[int]]:
        return [one["tokens"] for one in self.rounds[index]]

    def logprobs(self, index: int = 0) -> torch.Tensor:
        return torch.tensor([one["logprobs"] for one in self.rounds[index]])

    @property
    def planned(self) -> list[str]:
        return [line.split("attn: ")[1] for line in self.log.splitlines() if "attn: " in line]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model."""

    def make(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / name
        if not path.exists():
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(path)
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**config, **OLD_FIELDS}))
        return path

    return make


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs an engine over the model in a folder: ``prompts`` together, ``rounds`` times."""

    def run(model: Path, prompts: list[list[int]], *, new: int = 12, rounds: int = 1, **options: Any) -> Run:
        answer = tmp_path_factory.mktemp("answers") / "answer.json"
        spec = {"prompts": prompts, "new": new, "rounds": rounds, "options": {"model_path": str(model), **options}}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("serve.py")), json.dumps(spec), str(answer)],
            capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ATTN_NUM_THREADS": "1"},
        )  # fmt: skip
        log = done.stdout + done.stderr
        if not answer.exists():
            return Run([], log)
        return Run(json.loads(answer.read_text()), log)

    return run
