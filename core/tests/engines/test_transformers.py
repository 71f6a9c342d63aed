"""transformers with attn inside: generate() as always, over pages, with the logits of eager attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from attn_core.engines.transformers import PagedCache, register
from attn_core.errors import ConfigError
from attn_core.runtime.batch import ForwardBatch
from torch import Tensor

from .tiny_models import GEMMA2_TEXT, IMAGE, LAYER_TYPES, MODELS, VISION, mllama, paligemma

#: largest difference of a logit from transformers' own eager attention, both in fp32
TOLERANCE = 1e-4
#: what a feature that is switched off must change at least
VISIBLE = 1e-2
NEW = 12
_serial = itertools.count()


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts of 21 and 15 tokens, padded on the left."""
    ids = torch.randint(5, 246, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return ids, mask


def fresh(changed: Callable[..., Any], **changes: Any) -> tuple[str, Any]:
    """A changed backend under a name that was never registered, and its implementation."""
    name = f"changed{next(_serial)}"
    cls = changed(name, **changes)
    assert f"attn-{name}" in register()
    return f"attn-{name}", cls


def generate(
    model: Any, implementation: str | dict[str, str], ids: Tensor, mask: Tensor | None = None, **options: Any
) -> Any:
    """Greedy tokens and the logits that they were chosen from."""
    model.eval().set_attn_implementation(implementation)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)


def distance(got: Any, wanted: Any) -> float:
    return float((torch.stack(got.logits) - torch.stack(wanted.logits)).abs().max())


@torch.no_grad()
def forward(model: Any, implementation: str, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    model.eval().set_attn_implementation(implementation)
    logits: Tensor = model(ids, attention_mask=mask, **options).logits
    return logits[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_as_with_eager_attention(name: str, prompts: tuple[Tensor, Tensor]) -> None:
    model = MODELS[name]()
    wanted = generate(model, "eager", *prompts)
    got = generate(model, "attn", *prompts)
    assert isinstance(got.past_key_values, PagedCache)
    assert torch.equal(got.sequences, wanted.sequences)
    assert distance(got, wanted) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_forward_pass_without_our_cache_gives_its_keys(
    name: str, use_cache: bool, prompts: tuple[Tensor, Tensor], changed: Any
) -> None:
    model = MODELS[name]()
    implementation, backend = fresh(changed)
    wanted = forward(model, "eager", *prompts, use_cache=False)
    assert (forward(model, implementation, *prompts, use_cache=use_cache) - wanted).abs().max() < TOLERANCE
    assert set(backend.modes) == {"ragged causal"}


def test_another_cache_of_transformers_works_too(prompts: tuple[Tensor, Tensor]) -> None:
    model = MODELS["gemma3"]()
    wanted = generate(model, "eager", *prompts)
    cache = hf.DynamicCache(config=model.config)
    assert distance(generate(model, "attn", *prompts, past_key_values=cache), wanted) < TOLERANCE


OFF: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "window": ("mistral", lambda at: replace(at, sliding_window=None)),
    "window off by one": ("mistral", lambda at: replace(at, sliding_window=9)),
    "window of some layers": ("gemma3", lambda at: replace(at, sliding_window=None)),
    "soft cap": ("gemma2", lambda at: replace(at, softcap=0.0)),
    "scale": ("gemma2", lambda at: replace(at, scale=at.qk_head_dim**-0.5)),
    "sinks": ("gpt_oss", lambda at: replace(at, sinks=None)),
    "scale before absorption": ("deepseek_v3", lambda at: replace(at, scale=at.qk_head_dim**-0.5)),
}


@pytest.mark.parametrize("feature", OFF)
def test_a_backend_that_forgets_a_feature_is_seen(feature: str, prompts: tuple[Tensor, Tensor], changed: Any) -> None:
    name, change = OFF[feature]
    model = MODELS[name]()
    implementation, _ = fresh(changed, layer=change)
    assert distance(generate(model, implementation, *prompts), generate(model, "eager", *prompts)) > VISIBLE


def test_padding_is_left_out_of_the_pages(prompts: tuple[Tensor, Tensor], changed: Any) -> None:
    seen: list[list[int]] = []
    implementation, _ = fresh(changed, batch=lambda batch: seen.append(batch.seq_lens.tolist()))
    generate(MODELS["llama"](), implementation, *prompts)
    assert seen[:3] == [[15, 21], [16, 22], [17, 23]]


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_padding_on_the_right(name: str, prompts: tuple[Tensor, Tensor]) -> None:
    model, (ids, mask) = MODELS[name](), prompts
    assert (forward(model, "attn", ids, mask.flip(1)) - forward(model, "eager", ids, mask.flip(1))).abs().max() < (
        TOLERANCE
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_beams_share_pages_and_copy_what_they_write_to(name: str, prompts: tuple[Tensor, Tensor]) -> None:
    model = MODELS[name]()
    beams = {"num_beams": 3, "num_return_sequences": 2}
    got, wanted = (generate(model, how, *prompts, **beams) for how in ("attn", "eager"))
    assert torch.equal(got.sequences, wanted.sequences)
    assert distance(got, wanted) < TOLERANCE


def test_several_samples_of_a_prompt(prompts: tuple[Tensor, Tensor]) -> None:
    model = MODELS["llama"]()
    sampled = {"do_sample": True, "num_return_sequences": 3}
    results = []
    for how in ("attn", "eager"):
        torch.manual_seed(1)
        results.append(generate(model, how, *prompts, **sampled).sequences)
    assert torch.equal(*results)


REPEATING = torch.tensor([[*range(20, 40), *range(20, 34)]])


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_prompt_lookup_is_verified_and_cropped(name: str, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    crops: list[int] = []
    crop = PagedCache.crop
    monkeypatch.setattr(PagedCache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
    implementation, backend = fresh(changed)
    wanted = generate(model, "eager", REPEATING, max_new_tokens=24)
    got = generate(model, implementation, REPEATING, max_new_tokens=24, prompt_lookup_num_tokens=4)
    assert torch.equal(got.sequences, wanted.sequences)
    assert backend.modes.count("TARGET_VERIFY") > 0
    assert backend.modes.count("EXTEND") == 1
    assert min(crops) < 0, "random weights follow no guess for long: some must have been thrown away"


def test_an_assistant_drafts_and_the_target_verifies(changed: Any) -> None:
    target, assistant = MODELS["llama"](), MODELS["llama"]()
    assistant.load_state_dict(target.state_dict())
    torch.nn.init.normal_(assistant.lm_head.weight[:128], std=0.2)  # right about half of the tokens
    implementation, backend = fresh(changed)
    drafting, drafter = fresh(changed)
    wanted = generate(target, "eager", REPEATING, max_new_tokens=20)
    drafts = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}
    assistant.generation_config.update(**drafts, assistant_confidence_threshold=0.0)
    assistant.eval().set_attn_implementation(drafting)
    got = generate(target, implementation, REPEATING, max_new_tokens=20, assistant_model=assistant)
    assert torch.equal(got.sequences, wanted.sequences)
    assert backend.modes.count("TARGET_VERIFY") > 1
    assert drafter.modes.count("DECODE") > 1, "the assistant drafts over a cache of its own"


def test_prompts_in_chunks(prompts: tuple[Tensor, Tensor], changed: Any) -> None:
    model = MODELS["gemma2"]()
    implementation, backend = fresh(changed)
    ids = prompts[0]
    got = generate(model, implementation, ids, prefill_chunk_size=8)
    assert distance(got, generate(model, "eager", ids)) < TOLERANCE
    assert backend.modes.count("EXTEND") == 3


@pytest.mark.parametrize("name", VISION)
def test_images_see_each_other_and_their_tower_is_ours_too(name: str, changed: Any) -> None:
    make, tokens = VISION[name]
    model, ids = make(), torch.tensor([tokens])
    inputs = {
        "pixel_values": torch.randn(1, 3, 28, 28),
        "token_type_ids": (ids == IMAGE).long() if name == "gemma3" else torch.zeros_like(ids),
    }
    spans: list[Any] = []

    def note(batch: ForwardBatch) -> None:
        if batch.spans is not None:
            spans.extend(tuple(span) for span in batch.spans[0].tolist())

    implementation, backend = fresh(changed, batch=note)
    wanted = generate(model, "eager", ids, **inputs)
    assert distance(generate(model, implementation, ids, **inputs), wanted) < TOLERANCE
    assert spans == [(4, 8)] if name == "gemma3" else [(0, 20)]
    assert backend.modes[:2] == ["ragged", "ragged"], "a tower of two layers, before the text"

    def forget(batch: ForwardBatch) -> None:
        batch.spans = None

    forgetful, _ = fresh(changed, batch=forget)
    assert distance(generate(model, forgetful, ids, **inputs), wanted) > VISIBLE


@pytest.mark.parametrize("layers", [LAYER_TYPES, LAYER_TYPES[::-1]], ids=["window first", "window last"])
def test_spans_that_reach_past_a_window_are_refused(layers: list[str]) -> None:
    model = paligemma(**GEMMA2_TEXT, sliding_window=8, layer_types=layers)
    ids = torch.tensor([[*[IMAGE] * 16, 2, 5]])
    with pytest.raises(ConfigError, match="neither causal"):
        generate(model, "attn", ids, pixel_values=torch.randn(1, 3, 28, 28), token_type_ids=torch.zeros_like(ids))


MLLAMA_PROMPTS = torch.tensor([[1, IMAGE, 5, 6, 7, 8, 9, 10], [1, 20, 21, IMAGE, 22, 23, 24, 25]])


def images_of_one_and_two_tiles() -> dict[str, Tensor]:
    """What transformers' processor gives for MLLAMA_PROMPTS: tokens from the image on see their image's tiles."""
    seen = torch.zeros(2, 8, 1, 2)
    seen[0, 1:, :, :1] = 1
    seen[1, 3:] = 1
    return {
        "pixel_values": torch.randn(2, 1, 2, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
        "cross_attention_mask": seen,
    }


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_cross_layers_keep_their_encoder_in_pages(options: dict[str, Any], changed: Any) -> None:
    model, inputs = mllama(), images_of_one_and_two_tiles()
    lens: list[Any] = []

    def note(batch: ForwardBatch) -> None:
        if batch.encoder_seq_lens is not None:
            lens.append((batch.encoder_seq_lens.tolist(), batch.encoder_slot_mapping is not None))

    implementation, _ = fresh(changed, batch=note)
    wanted = generate(model, "eager", MLLAMA_PROMPTS, **inputs, **options)
    ours = {"text_config": implementation, "vision_config": "eager"}
    got = generate(model, ours, MLLAMA_PROMPTS, **inputs, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    assert distance(got, wanted) < TOLERANCE
    if not options:
        # Tokens before an image see its padding tile too, so that they are a request of their own.
        assert lens[:3] == [([34, 17, 34], True), ([17, 34], False), ([17, 34], False)]

    def blind(batch: ForwardBatch) -> None:
        if batch.encoder_seq_lens is not None:
            batch.encoder_seq_lens[:] = 34  # the padding tile too

    forgetful = {"text_config": fresh(changed, batch=blind)[0], "vision_config": "eager"}
    assert distance(generate(model, forgetful, MLLAMA_PROMPTS, **inputs, **options), wanted) > VISIBLE


def test_cross_layers_are_skipped_for_text_alone() -> None:
    model = mllama()
    text = torch.randint(5, 246, (2, 9))
    assert distance(generate(model, "attn", text), generate(model, "eager", text)) < TOLERANCE


def test_a_conversation_goes_on_in_the_cache_that_generate_made(changed: Any) -> None:
    model, ids = MODELS["gemma3"](), torch.randint(5, 246, (1, 9))
    implementation, backend = fresh(changed)
    first = generate(model, implementation, ids)
    longer = torch.cat((first.sequences, torch.randint(5, 246, (1, 30))), dim=1)
    backend.modes.clear()
    got = generate(model, implementation, longer, past_key_values=first.past_key_values, max_new_tokens=40)
    assert distance(got, generate(model, "eager", longer, max_new_tokens=40)) < TOLERANCE
    assert backend.modes == ["EXTEND", *["DECODE"] * 39]


def generate_batch(model: Any, implementation: str, inputs: list[list[int]]) -> Any:
    model.eval().set_attn_implementation(implementation)
    return model.generate_batch(
        inputs=inputs,
        generation_config=hf.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=hf.ContinuousBatchingConfig(
            page_size=16, num_blocks=64, max_batch_tokens=16, use_cuda_graph=False, auto_switch_to_flash=False
        ),
        progress_bar=False,
    )


def test_continuous_batching_has_no_latent_cache() -> None:
    with pytest.raises(ConfigError, match="no room for a latent"):
        generate_batch(MODELS["deepseek_v3"](), "attn", [[5, 6, 7]])


#: what a backend must not forget, and does in the control
PACKED: dict[str, dict[str, Any]] = {
    "gemma2": {"softcap": 0.0},
    "gemma3": {"sliding_window": None},
    "gpt_oss": {"sinks": None},
}


@pytest.mark.parametrize("name", PACKED)
def test_continuous_batching(name: str, changed: Any) -> None:
    """gpt_oss and gemma3 mix windows and full layers; gemma2 has a soft cap, which transformers' own drops here."""
    model = MODELS[name]()
    inputs = [torch.randint(5, 246, (n,)).tolist() for n in (25, 6, 17)]
    wanted = [generate(model, "eager", torch.tensor([each])).sequences[0, len(each) :].tolist() for each in inputs]
    implementation, backend = fresh(changed)
    results = generate_batch(model, implementation, inputs)
    assert [result.error for result in results.values()] == [None] * 3
    assert [result.generated_tokens for result in results.values()] == wanted
    assert set(backend.modes) == {"ragged causal"}
    assert model.config._attn_implementation == implementation
    forgetful, _ = fresh(changed, layer=lambda at: replace(at, **PACKED[name]))
    others = generate_batch(model, forgetful, inputs)
    assert [result.generated_tokens for result in others.values()] != wanted
