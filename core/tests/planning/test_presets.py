"""Every preset is what its model is: the numbers once more, from the published configs, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attn_core.errors import ModelFolderError, UnknownModelError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.presets import config_for, load_preset, preset_data, preset_names


def kind(count: int, heads: int, kv_heads: int, width: int, **more: Any) -> tuple[int, LayerKind]:
    return count, LayerKind(heads, kv_heads, width, more.pop("v_head_dim", width), **more)


def mla(count: int, heads: int, scale: float) -> tuple[int, LayerKind]:
    return kind(count, heads, 1, 576, v_head_dim=512, kind="mla", scale=scale)


#: yarn's temperature (0.1 mscale ln(factor) + 1) squared, over sqrt(128 + 64)
YARN_40 = 1.3688879454113936**2 / 192**0.5
YARN_40_LITE = 1.2608037774058553**2 / 192**0.5
YARN_32 = 1.3465735902799727**2 / 192**0.5

#: name -> dtype, context, kinds with the number of their layers
PRESETS: dict[str, tuple[str, int, list[tuple[int, LayerKind]]]] = {
    "llama-3.1-8b": ("bfloat16", 131072, [kind(32, 32, 8, 128)]),
    "llama-3.1-70b": ("bfloat16", 131072, [kind(80, 64, 8, 128)]),
    "qwen3-32b": ("bfloat16", 40960, [kind(64, 64, 8, 128)]),
    "mistral-7b": ("bfloat16", 32768, [kind(32, 32, 8, 128, sliding_window=4096)]),
    "gemma-2-9b": (
        "bfloat16",
        8192,
        [kind(21, 16, 8, 256, scale=256**-0.5, softcap=50.0, sliding_window=window) for window in (4096, None)],
    ),
    "gemma-3-27b": (
        "bfloat16",
        131072,
        [
            kind(52, 32, 16, 128, scale=168**-0.5, sliding_window=1024),
            kind(10, 32, 16, 128, scale=168**-0.5),
            kind(0, 16, 16, 72, ragged=True, causal=False),
        ],
    ),
    "gpt-oss-120b": ("bfloat16", 131072, [kind(18, 64, 8, 64, sinks=True, sliding_window=w) for w in (128, None)]),
    "deepseek-v3": ("bfloat16", 163840, [mla(61, 128, YARN_40)]),
    "deepseek-v2-lite": ("bfloat16", 163840, [mla(27, 16, YARN_40_LITE)]),
    "kimi-k2": ("bfloat16", 131072, [mla(61, 64, YARN_32)]),
    "llama-3.2-11b-vision": (
        "bfloat16",
        131072,
        [kind(32, 32, 8, 128), kind(8, 32, 8, 128, cross=True, causal=False)],
    ),
    "smollm2-135m": ("bfloat16", 8192, [kind(30, 9, 3, 64)]),
    "whisper-large-v3": (
        "float16",
        448,
        [
            kind(32, 20, 20, 64),
            kind(32, 20, 20, 64, cross=True, causal=False),
            kind(0, 20, 20, 64, ragged=True, causal=False),
        ],
    ),
}


def test_the_presets_are_these() -> None:
    assert preset_names() == tuple(sorted(PRESETS))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_its_model(name: str) -> None:
    made = load_preset(name)
    dtype, context, kinds = PRESETS[name]
    assert (made.model, made.dtype, made.max_context_len) == (name, dtype, context)
    assert [len(found.layer_ids) for found in made.layers] == [count for count, _ in kinds]
    for found, (_, expected) in zip(made.layers, kinds, strict=True):
        assert found.softmax_scale == pytest.approx(expected.softmax_scale, rel=1e-12)
        assert LayerKind(**{**_fields(found), "layer_ids": (), "scale": expected.scale}) == expected


def _fields(kind: LayerKind) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in LayerKind.__dataclass_fields__}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_layer_has_a_kind_and_is_counted_once(name: str) -> None:
    made = load_preset(name)
    ids = sorted(i for found in made.layers for i in found.layer_ids)
    assert ids == list(range(made.num_layers))
    assert [made.kind_of(i) for i in ids]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_names_its_source_and_nothing_that_attention_does_not_need(name: str) -> None:
    data = preset_data(name)
    assert data["_source"].count("/") == 1
    needless = {"vocab_size", "intermediate_size", "rms_norm_eps", "transformers_version"}
    assert not needless & set(data)


def test_which_models_are_multimodal_and_which_have_spans() -> None:
    made = {name: load_preset(name) for name in PRESETS}
    assert {n for n, c in made.items() if c.multimodal} == {"gemma-3-27b", "llama-3.2-11b-vision", "whisper-large-v3"}
    assert {n for n, c in made.items() if c.bidirectional_spans} == {"gemma-3-27b"}


def test_the_windows_of_gemma_and_gpt_oss_lie_where_the_models_have_them() -> None:
    assert load_preset("gemma-2-9b").kind_of(0).sliding_window == 4096
    assert load_preset("gemma-2-9b").kind_of(1).sliding_window is None
    assert [load_preset("gemma-3-27b").kind_of(i).sliding_window for i in (0, 4, 5, 6, 11, 61)] == [
        1024, 1024, None, 1024, None, 1024,
    ]  # fmt: skip
    assert [load_preset("gpt-oss-120b").kind_of(i).sliding_window for i in (0, 1, 35)] == [128, None, None]
    assert load_preset("llama-3.2-11b-vision").kind_of(3).cross
    assert not load_preset("llama-3.2-11b-vision").kind_of(4).cross


def test_a_preset_takes_how_it_is_served() -> None:
    made = AttentionConfig.preset("llama-3.1-8b", page_size=64, kv_cache_dtype="fp8_e4m3")
    assert (made.page_size, made.kv_cache_dtype, made.model) == (64, "fp8_e4m3", "llama-3.1-8b")


def test_a_model_is_a_preset_or_a_file_or_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(preset_data("smollm2-135m"))))
    expected = load_preset("smollm2-135m").replace(model="my-model")
    assert config_for("smollm2-135m", page_size=1).page_size == 1
    assert config_for(str(folder)) == config_for(str(folder / "config.json")) == expected


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("llama-3.1-8", "did you mean 'llama-3.1-8b'?"),
        ("deepseek-v4", "did you mean 'deepseek-v3'?"),
        ("???", "whisper-large-v3"),
    ],
)
def test_an_unknown_model_names_the_nearest_and_all(model: str, word: str) -> None:
    for ask in (config_for, load_preset):
        with pytest.raises(UnknownModelError) as caught:
            ask(model)
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "there is no"), ("{", "cannot be read"), ("[1]", "no JSON object"), (b"\xff", "cannot be read")],
)
def test_a_folder_that_cannot_be_read_as_a_model_says_so(
    tmp_path: Path, content: str | bytes | None, word: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelFolderError, match=word):
        config_for(str(tmp_path))
