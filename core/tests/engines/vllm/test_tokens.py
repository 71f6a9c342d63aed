"""Greedy tokens through the adapter are those of vLLM's own attention, and the planned backends made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attn_core
import pytest
import torch
import transformers as hf
from attn_core.planning.manifest import Manifest
from attn_core.runtime.torch_native.backend import TorchNativeBackend

from .conftest import NEW_TOKENS, PROMPTS, Generated

Ran = set[tuple[str, str]]
Ours = Callable[..., Generated]
Stock = Callable[..., Generated]

#: vLLM's C++ rope for a CPU turns MLA's queries wrongly where they are a slice (its own attention then departs from
#: transformers' too), so both sides run its rope in torch.
TORCH_OPS = {"custom_ops": ["none"]}


@pytest.mark.parametrize(
    ("backend", "prefills", "decodes"),
    [
        ("torch_native", "torch_native", "torch_native"),
        ("guest", "guest", "guest"),
        ("prefill=guest,decode=torch_native", "guest", "torch_native"),
    ],
)
def test_a_backend_for_each_phase(
    backend: str, prefills: str, decodes: str, ours: Ours, stock: Stock, ran: Ran
) -> None:
    """Prompts in chunks beside decodes, two of them sharing pages within a step; then again with prefix hits."""
    made = ours("llama", backend)
    assert made == stock("llama")
    assert made.again == made.tokens
    assert made.cached > 0
    assert {name for name, mode in ran if mode == "DECODE"} == {decodes}
    assert {name for name, mode in ran if mode == "EXTEND"} == {prefills}


def test_a_prefix_that_is_shared_in_the_step_that_fills_it(ours: Ours, stock: Stock, ran: Ran) -> None:
    """One token left of the second prompt: a decode to the plan, of keys that the first prompt's backend attends to."""
    first = [3 + i * 7 % 200 for i in range(200)]
    options: dict[str, Any] = {"prompts": (first, [*first[:192], 77]), "max_num_batched_tokens": 512, "block_size": 32}
    made = ours("llama", "prefill=guest,decode=torch_native", **options)
    assert made.tokens == stock("llama", **options).tokens
    assert ("guest", "EXTEND") in ran


def test_additional_config_comes_before_the_environment(ours: Ours, stock: Stock, ran: Ran) -> None:
    made = ours("llama", "torch_native", additional_config={"attn_backend": "guest"}, block_size=16)
    assert made.tokens == stock("llama").tokens
    assert {name for name, _ in ran} == {"guest"}


@pytest.mark.parametrize("model", ["gemma2", "gpt_oss"])
def test_windows_soft_caps_and_sinks(model: str, ours: Ours, stock: Stock, ran: Ran) -> None:
    """Layers with windows and without, in caches of their own."""
    made = ours(model, "auto", block_size=16)
    assert made.tokens == stock(model).tokens
    assert made.again == made.tokens
    assert {name for name, _ in ran} == {"torch_native"}


@pytest.mark.parametrize(
    ("model", "forgotten"), [("gemma2", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "sinks")]
)
def test_the_tokens_show_what_a_backend_forgets(
    model: str, forgotten: str, ours: Ours, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    class Forgetful(TorchNativeBackend):
        name = "forgetful"

        def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, *args: Any, **options: Any) -> Any:
            nothing: Any = 0.0 if forgotten == "softcap" else None
            return super().forward_extend(q, k, v, replace(layer, **{forgotten: nothing}), *args, **options)

    text = Path(attn_core.__file__).with_name("torch_native.toml").read_text(encoding="utf-8")
    attn_core.register(Forgetful, Manifest.parse(text.replace('name = "torch_native"', 'name = "forgetful"')))
    try:
        assert ours(model, "forgetful", block_size=16).tokens != stock(model).tokens
    finally:
        attn_core.unregister("forgetful")


def test_mla_over_the_latent(ours: Ours, stock: Stock, ran: Ran) -> None:
    """vLLM's own runs expanded prefill without chunks or prefix hits; ours every phase with absorbed queries."""
    made = ours("deepseek", "torch_native", compilation_config=TORCH_OPS)
    assert made.tokens == stock("deepseek", compilation_config=TORCH_OPS).tokens
    assert made.again == made.tokens
    assert made.cached > 0
    assert ran == {("torch_native", mode) for mode in ("DECODE", "MIXED", "EXTEND")}


def test_mla_prefill_from_the_registry(ours: Ours, stock: Stock, ran: Ran) -> None:
    """New tokens and cached prefixes expanded, through `ragged`; decodes over the latent."""
    config = {"mla_prefill_backend": "CUSTOM"}
    made = ours("deepseek", "torch_native", attention_config=config, compilation_config=TORCH_OPS)
    assert made.tokens == stock("deepseek", compilation_config=TORCH_OPS).tokens
    assert made.again == made.tokens
    assert made.cached > 0
    assert ran == {("torch_native", "DECODE")}


def test_an_fp8_cache_holds_rounded_keys(ours: Ours, models: Callable[[str], Path]) -> None:
    """Tokens of transformers' model, whose attention is given every key and value rounded to fp8."""
    made = ours("llama", "torch_native", kv_cache_dtype="fp8")
    model = hf.LlamaForCausalLM.from_pretrained(models("llama"), attn_implementation=rounded_attention())
    for prompt, tokens in zip(PROMPTS, made.tokens, strict=True):
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out[0, len(prompt) :].tolist() == tokens
    assert made.again == made.tokens


def rounded_attention() -> str:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        key, value = (x.to(torch.float8_e4m3fn).float() for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **options)

    hf.AttentionInterface.register("rounded", attend)
    hf.AttentionMaskInterface.register("rounded", hf.masking_utils.sdpa_mask)
    return "rounded"


def test_guesses_are_verified(ours: Ours, stock: Stock, ran: Ran) -> None:
    """A request alone: with others, steps of different lengths are prompts to the plan."""
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    made = ours("llama", "torch_native", prompts=PROMPTS[1:2], speculative_config=guesses)
    assert made.tokens == stock("llama").tokens[1:2]
    assert ("torch_native", "TARGET_VERIFY") in ran
