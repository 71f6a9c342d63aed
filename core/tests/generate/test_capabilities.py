"""Every capability of a model, through its own code over our pages: logits as with eager attention, and only so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from attn_core.errors import BatchError, ConfigError
from attn_core.generate.model import check_served
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardMode, TreeMask
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

#: largest difference of a logit from transformers' own eager attention, both in fp32
TOLERANCE = 1e-4
#: what a feature that is switched off must change at least
VISIBLE = 1e-2

# initializer_range 0.2: with the default 0.02 attention is nearly uniform, and a wrong mask hardly changes a logit.
BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LATENT: dict[str, Any] = {
    **BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


def gpt_oss() -> Any:
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **BASE, head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, layer_types=LAYER_TYPES,
            rope_parameters=ROPE, pad_token_id=0,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BASE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**BASE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**BASE, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **BASE, head_dim=16, query_pre_attn_scalar=24, sliding_window=8, attn_logit_softcapping=5.0,
            layer_types=LAYER_TYPES,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**BASE, head_dim=16, query_pre_attn_scalar=24, sliding_window=8, layer_types=LAYER_TYPES)
    ),
    "gpt_oss": gpt_oss,
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**LATENT)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**LATENT)),
    "deepseek_v3_yarn": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**LATENT, rope_parameters=YARN)),
}  # fmt: skip


def config_of(model: Any) -> AttentionConfig:
    return AttentionConfig.from_hf(model.config.to_dict())


@torch.inference_mode()
def eager(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    model.eval().cpu().set_attn_implementation("eager")
    return [model(input_ids=torch.tensor([s])).logits[0] for s in sequences]


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((g - w).abs().max()) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_eager_attention(
    name: str, driver: Any, sequences: list[list[int]], steps: list[list[int]]
) -> None:
    model = MODELS[name]()
    wanted = eager(model, sequences)
    assert distance(driver(model, config_of(model)).run(sequences, steps), wanted) < TOLERANCE


def reversed_heads(q: Tensor, layer: AttentionLayer) -> Tensor:
    """Query head h reads KV head h % Hkv instead of h // group."""
    kv = layer.num_kv_heads
    return q.unflatten(1, (kv, -1)).transpose(1, 2).flatten(1, 2)


OFF: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("qwen3", {"query": reversed_heads}),
    "window of every layer": ("mistral", {"layer": lambda at: replace(at, sliding_window=None)}),
    "window of some layers": ("gemma3", {"layer": lambda at: replace(at, sliding_window=None)}),
    "window off by one": ("mistral", {"layer": lambda at: replace(at, sliding_window=9)}),
    "soft cap": ("gemma2", {"layer": lambda at: replace(at, softcap=0.0)}),
    "scale of the config": ("gemma2", {"layer": lambda at: replace(at, scale=at.qk_head_dim**-0.5)}),
    "sinks": ("gpt_oss", {"layer": lambda at: replace(at, sinks=None)}),
    "scale before absorption": ("deepseek_v3", {"layer": lambda at: replace(at, scale=at.qk_head_dim**-0.5)}),
    "scale of yarn": ("deepseek_v3_yarn", {"layer": lambda at: replace(at, scale=24**-0.5)}),
    "rope half of the latent": ("deepseek_v2", {"query": lambda q, at: q * (torch.arange(32) < at.v_head_dim)}),
}  # fmt: skip


@pytest.mark.parametrize("feature", OFF)
def test_without_the_feature_logits_differ(
    feature: str, driver: Any, sequences: list[list[int]], steps: list[list[int]]
) -> None:
    name, forget = OFF[feature]
    model = MODELS[name]()
    wanted = eager(model, sequences)
    assert distance(driver(model, config_of(model), forget=forget).run(sequences, steps), wanted) > VISIBLE


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3"])
def test_any_page_size(
    name: str, page_size: int, driver: Any, sequences: list[list[int]], steps: list[list[int]]
) -> None:
    model = MODELS[name]()
    wanted = eager(model, sequences)
    assert distance(driver(model, config_of(model), page_size=page_size).run(sequences, steps), wanted) < TOLERANCE


TEXT = {**BASE, "head_dim": 16}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 28, "patch_size": 7, "vision_use_head": False}  # fmt: skip
IMAGE = 255


def gemma3_vision() -> Any:
    config = hf.Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": LAYER_TYPES},
        vision_config=TOWER, mm_tokens_per_image=4, boi_token_index=253, eoi_token_index=254,
    )  # fmt: skip
    config.image_token_id = IMAGE
    return hf.Gemma3ForConditionalGeneration(config).eval()


def paligemma(text: str = "gemma") -> Any:
    more = {"layer_types": LAYER_TYPES, "sliding_window": 24, "query_pre_attn_scalar": 16} if text == "gemma2" else {}
    config = hf.PaliGemmaConfig(
        text_config={**TEXT, **more, "model_type": text}, projection_dim=64, hidden_size=64,
        vision_config={**TOWER, "projection_dim": 64, "model_type": "siglip_vision_model"},
    )  # fmt: skip
    config.image_token_id = IMAGE
    return hf.PaliGemmaForConditionalGeneration(config).eval()


@torch.inference_mode()
def eager_with_images(
    model: Any, sequences: list[list[int]], prompts: list[int], images: Tensor, image_type: int
) -> list[Tensor]:
    """Prompt at once with its image, then token by token over transformers' own cache."""
    model.set_attn_implementation("eager")
    logits = []
    for i, (tokens, n) in enumerate(zip(sequences, prompts, strict=True)):
        ids = torch.tensor([tokens])
        types = (ids[:, :n] == IMAGE).long() if image_type else torch.zeros_like(ids[:, :n])
        cache = hf.DynamicCache(config=model.config.get_text_config())
        parts = [
            model(
                input_ids=ids[:, :n], pixel_values=images[i : i + 1], token_type_ids=types,
                attention_mask=torch.ones_like(ids[:, :n]), past_key_values=cache, use_cache=True,
            ).logits[0]
        ]  # fmt: skip
        parts += [
            model(input_ids=ids[:, p : p + 1], past_key_values=cache, use_cache=True).logits[0]
            for p in range(n, len(tokens))
        ]
        logits.append(torch.cat(parts))
    return logits


PREFIXES = [[*[IMAGE] * 16, 2, 5, 6, 7], [*[IMAGE] * 16, 2, 9]]

#: model, prompts with their images, the spans that the model means, whether only images are spans
VISION: dict[str, tuple[Callable[[], Any], list[list[int]], list[list[tuple[int, int]]], int]] = {
    "gemma3": (
        gemma3_vision,
        [[2, 5, 6, 255, 255, 255, 255, 7, 8, 9], [2, *[11] * 9, *[255] * 4, 12, 13]],
        [[(3, 7)], [(10, 14)]],
        1,
    ),
    "paligemma": (paligemma, PREFIXES, [[(0, 20)], [(0, 18)]], 0),
    "paligemma2": (lambda: paligemma("gemma2"), PREFIXES, [[(0, 20)], [(0, 18)]], 0),
}  # fmt: skip


@pytest.mark.parametrize("off", [False, True], ids=["spans", "without spans"])
@pytest.mark.parametrize("name", VISION)
def test_tokens_of_an_image_see_each_other(name: str, off: bool, driver: Any) -> None:
    build, prompts, spans, image_type = VISION[name]
    model = build()
    sequences = [p + torch.randint(5, 200, (8,)).tolist() for p in prompts]
    images = torch.randn(len(prompts), 3, 28, 28)
    wanted = eager_with_images(model, sequences, [len(p) for p in prompts], images, image_type)
    forget = {"batch": lambda batch: setattr(batch, "spans", None)} if off else {}
    if off and name != "gemma3":
        # The adapter refuses these layers without spans, so that the control is what it would have computed.
        for module in model.modules():
            if getattr(module, "is_causal", True) is False and hasattr(module, "layer_idx"):
                module.is_causal = True
    steps = [[len(p) for p in prompts], *[[1, 1]] * 8]
    got = driver(model, config_of(model), forget=forget).run(
        sequences, steps, spans=spans, inputs={"pixel_values": images}
    )
    if off:
        assert distance(got, wanted) > VISIBLE
    else:
        assert distance(got, wanted) < TOLERANCE


def test_a_prefix_model_without_spans_is_refused(driver: Any) -> None:
    model = paligemma()
    with pytest.raises(BatchError, match="not causal"):
        driver(model, config_of(model)).run([[2, 5, 6]], [[3]])


def test_a_span_longer_than_the_window_is_refused_where_the_model_sees_past_it(driver: Any) -> None:
    model = paligemma("gemma2")
    tokens = [*[255] * 16, *range(2, 20)]
    with pytest.raises(BatchError, match="span of 34 tokens over a window of 24"):
        driver(model, config_of(model)).run(
            [tokens], [[34]], spans=[[(0, 34)]], inputs={"pixel_values": torch.randn(1, 3, 28, 28)}
        )


def mllama() -> Any:
    config = hf.MllamaConfig(
        text_config={**BASE, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
                       "attention_heads": 2, "image_size": 28, "patch_size": 7, "max_num_tiles": 2,
                       "vision_output_dim": 64, "intermediate_layers_indices": [0],
                       "supported_aspect_ratios": [[1, 1], [1, 2]]},
        image_token_index=IMAGE,
    )  # fmt: skip
    model = hf.MllamaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:  # they begin at 0, which would hide the cross layers
            torch.nn.init.constant_(parameter, 1.0)
    return model


PATCHES = 17  # of a tile: 4 x 4 and the class token


@torch.inference_mode()
def eager_with_encoder(
    model: Any, sequences: list[list[int]], inputs: dict[str, Tensor], tiles: list[int], first: list[int]
) -> list[Tensor]:
    """All of a sequence at once: tokens from the image token on see the image's tiles, those before it nothing."""
    model.set_attn_implementation("eager")
    logits = []
    for i, tokens in enumerate(sequences):
        mask = torch.zeros(1, len(tokens), 1, 2)
        mask[:, first[i] :, :, : tiles[i]] = 1
        own = {name: value[i : i + 1] for name, value in inputs.items()}
        logits.append(model(input_ids=torch.tensor([tokens]), cross_attention_mask=mask, **own).logits[0])
    return logits


@pytest.mark.parametrize("off", [False, True], ids=["cross", "without cross"])
def test_cross_layers_read_what_the_first_step_wrote(off: bool, driver: Any, encoder: Any) -> None:
    model = mllama()
    sequences = [[1, IMAGE, 5, 6, 7, 8, 9, 10], [1, 20, 21, IMAGE, 22, 23, 24, 25]]
    tiles, first = [1, 2], [1, 3]
    # Tokens before the image see the padding tile too (transformers masks their MLP, not their attention), so that they
    # are a chunk of their own.
    steps = [[1, 3], [4, 1], [2, 1], [1, 2], [0, 1]]
    inputs = {
        "pixel_values": torch.randn(2, 1, 2, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
    }
    wanted = eager_with_encoder(model, sequences, inputs, tiles, first)
    images = encoder(lens=[n * PATCHES for n in tiles], inputs=inputs, rows=2 * PATCHES, first_seen=first)
    forget = {"query": lambda q, layer: q * 0 if layer.cross else q} if off else {}
    got = driver(model, config_of(model), forget=forget).run(sequences, steps, encoder=images)
    if off:
        assert distance(got, wanted) > VISIBLE
    else:
        assert distance(got, wanted) < TOLERANCE


def test_cross_layers_are_skipped_for_text_alone(
    driver: Any, sequences: list[list[int]], steps: list[list[int]]
) -> None:
    model = mllama()
    wanted = eager(model, sequences)
    assert distance(driver(model, config_of(model)).run(sequences, steps), wanted) < TOLERANCE


def test_a_batch_with_an_encoder_for_some_requests_is_refused(driver: Any, encoder: Any) -> None:
    model = mllama()
    images = encoder(lens=[PATCHES, 0], inputs={}, rows=PATCHES, first_seen=[0, 0])
    with pytest.raises(BatchError, match="for each request of the batch, or for none"):
        driver(model, config_of(model)).run([[1, 5], [1, 6]], [[2, 2]], encoder=images)


def changed(config: AttentionConfig, **fields: Any) -> AttentionConfig:
    return config.replace(layers=tuple(replace(kind, **fields) for kind in config.layers))


DISAGREEMENTS = {
    "window": ("mistral", {"sliding_window": None}),
    "window of another size": ("mistral", {"sliding_window": 7}),
    "soft cap": ("gemma2", {"softcap": 0.0}),
    "scale": ("gemma2", {"scale": 0.25}),
    "sinks": ("gpt_oss", {"sinks": False}),
    "sinks that are not there": ("mistral", {"sinks": True}),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_plan_that_is_not_what_the_code_asks_for_is_refused(what: str, driver: Any) -> None:
    name, fields = DISAGREEMENTS[what]
    model = MODELS[name]()
    with pytest.raises(ConfigError):
        driver(model, changed(config_of(model), **fields)).run([[5, 6, 7]], [[3]])


def test_a_layer_that_never_asks_is_refused(driver: Any) -> None:
    model = MODELS["llama"]()
    config = config_of(model)
    more = config.replace(layers=(replace(config.layers[0], layer_ids=(0, 1, 2)),))
    with pytest.raises(ConfigError, match=r"layers \[2\] are planned"):
        driver(model, more).run([[5, 6, 7]], [[3]])


def test_rope_that_follows_the_longest_sequence_is_refused(driver: Any) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**BASE, rope_parameters=rope))
    with pytest.raises(ConfigError, match="rope of type dynamic"):
        driver(model, config_of(model))


def test_an_unknown_argument_of_attention_is_refused(driver: Any) -> None:
    model = MODELS["llama"]()
    drive = driver(model, config_of(model))
    with pytest.raises(ConfigError, match="indices"):
        drive.run([[5, 6, 7]], [[3]], inputs={"indices": torch.zeros(1)})


def test_a_tree_of_drafts_has_the_logits_of_each_of_its_branches(driver: Any) -> None:
    """Verify with a tree: a token's position is the prefix and its ancestors, and it sees only those."""
    model = MODELS["qwen3"]()
    prompt, tree = [5, 6, 7, 8, 9], [(10, -1), (11, 0), (12, 0), (13, 2)]
    wanted = eager(model, [[*prompt, 10, 11], [*prompt, 10, 12, 13]])
    config = config_of(model).replace(speculative_num_draft_tokens=4, speculative_eagle_topk=2)
    drive = driver(model, config)
    pages = drive.pages(16)
    tokens, extend = drive.batch(ForwardMode.EXTEND, [5], [5], [pages])
    drive.paged.forward(torch.tensor(prompt, device=tokens.device), extend)
    _, verify = drive.batch(ForwardMode.TARGET_VERIFY, [4], [9], [pages])
    verify.tree = TreeMask.from_parents(torch.tensor([[parent for _, parent in tree]], device=tokens.device))
    got = drive.paged.forward(torch.tensor([t for t, _ in tree], device=tokens.device), verify).cpu()
    branches = [got[[0, 1]], got[[0, 2, 3]]]
    assert distance(branches, [wanted[0][5:], wanted[1][5:]]) < TOLERANCE


MEANINGLESS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fewer tokens than slots": ("llama", {"query": [3], "tokens": 2}, "for 3 slots"),
    "an encoder without cross layers": ("llama", {"query": [3], "encoder_seq_lens": [4]}, "without cross layers"),
    "spans that were not planned": ("llama", {"query": [3], "spans": [[(0, 2)]]}, "without bidirectional_spans"),
}


@pytest.mark.parametrize("what", MEANINGLESS)
def test_a_batch_that_the_model_cannot_mean_is_refused(what: str, driver: Any) -> None:
    name, given, message = MEANINGLESS[what]
    model = MODELS[name]()
    drive = driver(model, config_of(model))
    more = {key: value for key, value in given.items() if key not in ("query", "tokens")}
    if "encoder_seq_lens" in more:
        more["encoder_pages"] = [drive.pages(4)]
    tokens, batch = drive.batch(ForwardMode.EXTEND, given["query"], given["query"], [drive.pages(8)], **more)
    with pytest.raises(BatchError, match=message):
        drive.paged.forward(tokens[: given.get("tokens")], batch)


def test_the_modules_without_a_batch_are_refused(driver: Any) -> None:
    model = MODELS["llama"]()
    driver(model, config_of(model))
    with pytest.raises(BatchError, match="called without a batch"):
        model(input_ids=torch.tensor([[5, 6]], device=model.device))


def test_a_latent_projection_that_is_no_linear_layer_is_refused(driver: Any) -> None:
    model = MODELS["deepseek_v3"]()
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = torch.nn.Linear(24, 4 * 32, bias=True)
    with pytest.raises(ConfigError, match="kv_b_proj"):
        driver(model, config_of(model)).run([[5, 6, 7]], [[3]])


@pytest.mark.parametrize("window", [512, 4096])
def test_a_window_that_no_sequence_outgrows_is_none(window: int, driver: Any, sequences: list[list[int]]) -> None:
    """max_position_embeddings is 512: planned with any window from there on, the code may ask for another or none."""
    model = MODELS["llama"]()
    wanted = eager(model, sequences)
    config = changed(config_of(model), sliding_window=window)
    assert distance(driver(model, config).run(sequences, [[25, 11, 17]]), wanted) < TOLERANCE


def test_without_a_context_length_windows_must_be_equal(driver: Any) -> None:
    model = MODELS["mistral"]()
    config = config_of(model).replace(max_context_len=None)
    assert driver(model, config).run([[5, 6, 7]], [[3]])
    with pytest.raises(ConfigError, match="sliding_window 8, the plan has None"):
        driver(model, changed(config, sliding_window=None)).run([[5, 6, 7]], [[3]])


@pytest.mark.parametrize(
    ("config", "has_cross", "message"),
    [(hf.WhisperConfig(), False, "encoder-decoder"), (hf.LlamaConfig(**BASE), True, "cross layers of llama")],
)
def test_architectures_that_are_not_served(config: Any, has_cross: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_served(config, has_cross=has_cross)
