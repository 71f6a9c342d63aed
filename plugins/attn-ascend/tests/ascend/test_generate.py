"""A tiny Llama and a tiny DeepSeek generate through `attn generate` on the emulated card, with the logits of eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attn_ascend import attend, latent
from attn_core.generate.model import PagedModel
from torch import Tensor

from .tiny_models import MODELS, PROMPTS, folder_of, generate


class Heard:
    """Every position's logits that the paged model gave, with the tokens before it: what is compared with eager."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[list[int], Tensor]] = []
        self._tokens: dict[int, list[int]] = {}
        forward = PagedModel.forward

        def heard(paged: PagedModel, tokens: Tensor, batch: Any, *, logits_at: Any = None, **more: Any) -> Tensor:
            logits = forward(paged, tokens, batch, logits_at=None, **more)
            self._listen(tokens, batch, logits)
            return logits if logits_at is None else logits[logits_at]

        monkeypatch.setattr(PagedModel, "forward", heard)

    def _listen(self, tokens: Tensor, batch: Any, logits: Tensor) -> None:
        """A token is known by the slot that it was written to; a sequence is the tokens of its slots."""
        starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for slot, token in zip(batch.slot_mapping.tolist(), tokens.tolist(), strict=True):
            self._tokens[slot] = token
        for b, length in enumerate(lengths):
            slots = [int(batch.page_table[b, p // 128]) * 128 + p % 128 for p in range(length)]
            sequence = [self._tokens[slot] for slot in slots]
            for row in range(starts[b], starts[b + 1]):
                position = length - (starts[b + 1] - row)
                self.rows.append((sequence[: position + 1], logits[row].float()))


@torch.inference_mode()
def eager(model: Any, rows: list[tuple[list[int], Tensor]]) -> list[Tensor]:
    """The logits after each of these sequences, of the model's own eager attention; each longest sequence runs once."""
    model.set_attn_implementation("eager")
    longest: dict[tuple[int, ...], Tensor] = {}
    for sequence, _ in sorted(rows, key=lambda row: -len(row[0])):
        if not any(key[: len(sequence)] == tuple(sequence) for key in longest):
            longest[tuple(sequence)] = model(input_ids=torch.tensor([sequence])).logits[0].float()
    return [
        next(out[len(sequence) - 1] for key, out in longest.items() if key[: len(sequence)] == tuple(sequence))
        for sequence, _ in rows
    ]


def distances(model: Any, rows: list[tuple[list[int], Tensor]]) -> tuple[float, float]:
    """How far ours, and eager's own float16, are from eager in float32 with the same weights: the root mean square."""
    ours, half = torch.stack([logits for _, logits in rows]), torch.stack(eager(model, rows))
    exact = torch.stack(eager(model.float(), rows))
    model.half()
    return tuple(float((got - exact).square().mean().sqrt()) for got in (ours, half))  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_to_eager_as_eager_is_in_float16(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder_of(name, tmp_path)
    heard = Heard(monkeypatch)
    said = generate(tmp_path)
    assert said["device"] == "emulated:ascend"
    assert {phase: set(ran) for phase, ran in said["ran"].items()} == {"prefill": {"ascend"}, "decode": {"ascend"}}
    ours, half = distances(model, heard.rows)
    assert ours <= 1.5 * half
    assert len(heard.rows) >= sum(len(p) for p in PROMPTS[1:])


def test_guessed_tokens_are_verified_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder_of("DeepSeek-V3", tmp_path)
    heard = Heard(monkeypatch)
    said = generate(tmp_path, "--speculative-num-draft-tokens", "4")
    assert set(said["ran"]["verify"]) == {"ascend"}
    ours, half = distances(model, heard.rows)
    assert ours <= 1.5 * half


@pytest.mark.parametrize("name", ["Llama", "DeepSeek-V3"])
def test_a_wrong_scale_is_seen_in_the_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the comparison is blind to it would not prove."""
    model = folder_of(name, tmp_path)
    heard = Heard(monkeypatch)
    right = attend._heads
    monkeypatch.setattr(attend, "_heads", lambda layer: {**right(layer), "softmax_scale": 1.1 * layer.scale})
    in_place = latent._attend_in_place
    monkeypatch.setattr(latent, "_attend_in_place", lambda ops, q, *rest: in_place(ops, 1.1 * q, *rest))
    generate(tmp_path)
    ours, half = distances(model, heard.rows)
    assert ours > 3 * half
