"""A tiny Llama and a tiny DeepSeek generate through `attn generate` on the emulated chip, with the logits of eager."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.cli.generate import command
from attn_core.generate.model import PagedModel
from attn_wave import attending
from click.testing import CliRunner
from torch import Tensor

hf = pytest.importorskip("transformers", reason="attn-core[demo] is not installed: there is no model to run")

SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64,
    "v_head_dim": 32, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=64)),
    "DeepSeek-V3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, **LATENT)),
}
PROMPTS = ["the same words, then one", "the same words, then another, longer"]
PAGE = 16


def folder_of(name: str, folder: Path) -> Any:
    """The model, saved to ``folder`` with a tokenizer whose tokens are bytes."""
    torch.manual_seed(0)
    model = MODELS[name]().half().eval()
    model.save_pretrained(folder)
    from tokenizers import Tokenizer as Bytes
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    backend = Bytes(BPE(vocab={token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return model


def generate(folder: Path, *options: str) -> dict[str, Any]:
    arguments = ["--model", str(folder), "--attention-backend", "wave", "--dtype", "float16", "--raw", "--json"]
    sizes = ["--max-new-tokens", "4", "--max-batch-tokens", "40", "--cache-mib", "16", "--page-size", str(PAGE)]
    place = ["--device", "emulated:gfx942", "--fallback", "error"]
    result = CliRunner().invoke(command, [*PROMPTS, *arguments, *sizes, *place, *options])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Heard:
    """Every position's logits that the paged model gave, with the tokens before it: what is compared with eager."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[list[int], Tensor]] = []
        self._tokens: dict[int, int] = {}
        forward = PagedModel.forward

        def heard(paged: PagedModel, tokens: Tensor, batch: Any, *, logits_at: Any = None, **more: Any) -> Tensor:
            logits = forward(paged, tokens, batch, logits_at=None, **more)
            self._listen(tokens, batch, logits)
            return logits if logits_at is None else logits[logits_at]

        monkeypatch.setattr(PagedModel, "forward", heard)

    def _listen(self, tokens: Tensor, batch: Any, logits: Tensor) -> None:
        """A token is known by the slot that it was written to; a sequence is the tokens of its slots."""
        starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        self._tokens |= dict(zip(batch.slot_mapping.tolist(), tokens.tolist(), strict=True))
        for b, length in enumerate(lengths):
            pages = batch.page_table[b].tolist()
            sequence = [self._tokens[pages[p // PAGE] * PAGE + p % PAGE] for p in range(length)]
            for row in range(starts[b], starts[b + 1]):
                end = length - (starts[b + 1] - row) + 1
                self.rows.append((sequence[:end], logits[row].float()))


@torch.inference_mode()
def eager(model: Any, rows: list[tuple[list[int], Tensor]]) -> Tensor:
    """The logits after each of these sequences, of the model's own eager attention; each longest sequence runs once."""
    model.set_attn_implementation("eager")
    longest: dict[tuple[int, ...], Tensor] = {}
    for sequence, _ in sorted(rows, key=lambda row: -len(row[0])):
        if not any(key[: len(sequence)] == tuple(sequence) for key in longest):
            longest[tuple(sequence)] = model(input_ids=torch.tensor([sequence])).logits[0].float()
    return torch.stack([
        next(out[len(sequence) - 1] for key, out in longest.items() if key[: len(sequence)] == tuple(sequence))
        for sequence, _ in rows
    ])  # fmt: skip


def distances(model: Any, rows: list[tuple[list[int], Tensor]]) -> tuple[float, float]:
    """How far ours, and eager's own float16, are from eager in float32 with the same weights: the root mean square."""
    ours, half = torch.stack([logits for _, logits in rows]), eager(model, rows)
    exact = eager(model.float(), rows)
    model.half()
    near, far = (float((got - exact).square().mean().sqrt()) for got in (ours, half))
    return near, far


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_to_eager_as_eager_is_in_float16(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder_of(name, tmp_path)
    heard = Heard(monkeypatch)
    said = generate(tmp_path)
    assert {phase: set(ran) for phase, ran in said["ran"].items()} == {"prefill": {"wave"}, "decode": {"wave"}}
    ours, half = distances(model, heard.rows)
    assert ours <= 1.5 * half
    # the first page of both prompts is the same, and computed once
    assert len(heard.rows) >= sum(map(len, PROMPTS)) - PAGE


def test_guessed_tokens_are_verified_and_graphs_replayed_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder_of("Llama", tmp_path)
    heard = Heard(monkeypatch)
    said = generate(tmp_path, "--speculative-num-draft-tokens", "3", "--cuda-graph")
    assert set(said["ran"]["verify"]) == {"wave"}
    ours, half = distances(model, heard.rows)
    assert ours <= 1.5 * half


def test_a_wrong_scale_is_seen_in_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the comparison is blind to it would not prove."""
    model = folder_of("Llama", tmp_path)
    heard = Heard(monkeypatch)
    monkeypatch.setattr(
        attending.Kernels, "factors", lambda self, layer: torch.tensor([1.1 * layer.scale, layer.softcap])
    )
    generate(tmp_path)
    ours, half = distances(model, heard.rows)
    assert ours > 3 * half
