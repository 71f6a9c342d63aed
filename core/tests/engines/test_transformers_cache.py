"""What a PagedCache holds, gives back and refuses, and what transformers may not ask of our implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from attn_core.engines.transformers import PagedCache, register
from attn_core.errors import BackendRefusedError, BatchError, CacheFullError, ConfigError, ProtocolError

from .tiny_models import BASE, MODELS

EXPLAIN = "attn explain MODEL shows what that is"


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def test_a_backend_that_cannot_is_refused_before_anything_runs() -> None:
    model = MODELS["llama"]().eval()
    model.set_attn_implementation("attn-triton")
    assert model.config._attn_implementation == "attn-triton"
    model.set_attn_implementation("attn-flashinfer")  # a name with flash in it is not transformers' FlashAttention
    for cached in (True, False):
        with pytest.raises(BackendRefusedError, match="flashinfer") as refused:
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0, use_cache=cached)
        assert str(refused.value).endswith('next: attn_implementation="attn" takes what can; ' + EXPLAIN)


@torch.no_grad()
def test_a_cache_that_is_full_says_what_it_holds() -> None:
    model = MODELS["llama"]().eval()
    model.set_attn_implementation("attn")
    cache = PagedCache(model, max_batch_size=1, max_seq_len=32, page_size=16)
    with pytest.raises(CacheFullError, match="3 pages of 16"):
        model(torch.zeros(1, 80, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()}, "an attention mask"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}, "neither causal"),
    ],
)
@torch.no_grad()
def test_masks_that_the_contract_cannot_say_are_refused(options: dict[str, Any], message: str) -> None:
    model = MODELS["llama"]().eval()
    model.set_attn_implementation("attn")
    with pytest.raises(ConfigError, match=message):
        model(torch.arange(5, 11)[None], **options)


@torch.no_grad()
def test_a_model_whose_tokens_see_later_ones_has_no_use_for_pages() -> None:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**BASE, is_causal=False)).eval()
    ids = torch.arange(5, 11)[None]
    model.set_attn_implementation("eager")
    wanted = model(ids, use_cache=False).logits
    model.set_attn_implementation("attn")
    assert (model(ids, use_cache=False).logits - wanted).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="later"):
        model(ids, past_key_values=PagedCache(model, max_batch_size=1, max_seq_len=32))


@torch.no_grad()
def test_a_mask_that_contradicts_the_cache_is_refused() -> None:
    model = MODELS["llama"]().eval()
    model.set_attn_implementation("attn")
    cache = PagedCache(model, max_batch_size=1, max_seq_len=32)
    model(torch.arange(5, 11)[None], past_key_values=cache)
    with pytest.raises(BatchError, match="differs"):
        model(torch.tensor([[5]]), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]), past_key_values=cache)


def test_training_is_refused() -> None:
    model = MODELS["llama"]().train()
    model.set_attn_implementation("attn")
    with pytest.raises(ConfigError, match="training"):
        model(torch.arange(5, 11)[None])


@torch.no_grad()
def test_a_cache_belongs_to_one_implementation(changed: Any) -> None:
    model = MODELS["llama"]().eval()
    with pytest.raises(ConfigError, match="'attn'"):
        PagedCache(model, max_batch_size=1, max_seq_len=32)
    model.set_attn_implementation("attn")
    cache = PagedCache(model, max_batch_size=1, max_seq_len=32)
    model.set_attn_implementation("attn-torch_native")
    with pytest.raises(BatchError, match="a cache for auto"):
        model(torch.arange(5, 11)[None], past_key_values=cache)


@torch.no_grad()
def test_crop_gives_pages_back() -> None:
    model = MODELS["llama"]().eval()
    model.set_attn_implementation("attn")
    cache = PagedCache(model, max_batch_size=1, max_seq_len=64, page_size=4)
    ids = torch.arange(5, 26)[None]
    whole = model(ids, past_key_values=cache).logits
    assert (cache.columns, cache.pages_in_use) == (21, 6)
    cache.crop(-10)
    assert (cache.columns, cache.pages_in_use) == (11, 3)
    again = model(ids[:, 11:], past_key_values=cache).logits
    assert (again - whole[:, 11:]).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="crop"):
        cache.crop(3)
    cache.reset()
    assert (cache.columns, cache.pages_in_use) == (0, 0)


def test_whisper_is_refused() -> None:
    config = hf.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config).eval()
    model.set_attn_implementation("attn")
    with pytest.raises(ConfigError, match=r"encoder-decoder|cross"):
        PagedCache(model, max_batch_size=1, max_seq_len=8)


def test_another_release_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.30.1")
    with pytest.raises(ProtocolError, match=r"transformers 5\.30\.1: the adapter was tested with 5\.23"):
        register()
