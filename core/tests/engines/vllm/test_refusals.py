"""What the adapter or the plan cannot do is refused by vLLM's own validation, with our reasons and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attn_core
import pytest
import torch
from attn_core.engines.vllm.backend import AttnBackend, AttnImpl
from attn_core.errors import AttnError
from attn_core.planning.manifest import Manifest
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from .conftest import Generated

#: a layer of the tiny llama, as vLLM's selector describes it
FACTS: dict[str, Any] = {"head_size": 32, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None}


@pytest.fixture(scope="module")
def config(models: Callable[[str], Path]) -> Any:
    return EngineArgs(model=str(models("llama")), skip_tokenizer_init=True, dtype="float32").create_engine_config()


@pytest.fixture
def chosen(config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """vLLM's choice for a layer with these facts, where ATTN_BACKEND is ``backend``."""

    def choose(backend: str, **facts: Any) -> str:
        monkeypatch.setenv("ATTN_BACKEND", backend)
        wanted = AttentionSelectorConfig(**{**FACTS, **facts})
        with set_current_vllm_config(config):
            return str(current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, wanted))

    return choose


@pytest.fixture
def narrow() -> Iterator[None]:
    """A backend `narrow` that has pages of 48 tokens alone, in a layout that cannot be split."""
    text = Path(attn_core.__file__).with_name("torch_native.toml").read_text(encoding="utf-8")
    for have, want in (
        ('name = "torch_native"', 'name = "narrow"'),
        ('page_sizes = "any"', "page_sizes = [48]"),
        ('kv_layouts = ["NHD", "HND"]', 'kv_layouts = ["HND"]'),
    ):
        text = text.replace(have, want)
    attn_core.register(type("Narrow", (TorchNativeBackend,), {"name": "narrow"}), Manifest.parse(text))
    yield
    attn_core.unregister("narrow")


def test_what_the_plan_takes_is_chosen(chosen: Callable[..., str]) -> None:
    assert chosen("guest") == f"{AttnBackend.__module__}.AttnBackend"


@pytest.mark.parametrize(
    ("backend", "facts", "words"),
    [
        (
            "guest",
            {"has_sliding_window": True},
            ("'guest' cannot run prefill", "feature_unsupported", "sliding_window"),
        ),
        ("guest", {"has_sink": True}, ("feature_unsupported", "sinks")),
        ("guest", {"kv_cache_dtype": "fp8"}, ("kv_dtype_unsupported", "fp8_e4m3", "auto")),
        ("torch_native", {"kv_cache_dtype": "int8_per_token_head"}, ("kv_cache_dtype int8_per_token_head", "fp8_e5m2")),
        ("nonsense", {}, ("nonsense", "torch_native")),
        ("fa3", {}, ("'fa3' cannot run prefill", "device_mismatch", "cpu", "cuda")),
        ("torch_native", {"use_sparse": True}, ("sparse MLA",)),
        ("torch_native", {"use_dcp": True}, ("decode context parallelism",)),
        ("torch_native", {"use_non_causal": True}, ("not causal",)),
        ("torch_native", {"attn_type": "encoder_only"}, ("attention type encoder_only", "decoder")),
        ("torch_native", {"use_mla": True}, ("a layer of MLA",)),
    ],
)
def test_refused_with_reasons(
    backend: str, facts: dict[str, Any], words: tuple[str, ...], chosen: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match="not valid for this configuration") as refused:
        chosen(backend, **facts)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.usefixtures("narrow")
def test_block_sizes_are_those_that_the_plan_can_use(chosen: Callable[..., str]) -> None:
    assert chosen("narrow", block_size=96)  # vLLM splits it
    with pytest.raises(ValueError, match="block_size 64, accepted: multiples of 48"):
        chosen("narrow", block_size=64)


def test_others_are_vllms_business(config: Any) -> None:
    with set_current_vllm_config(config):
        path = current_platform.get_attn_backend_cls(AttentionBackendEnum.CPU_ATTN, AttentionSelectorConfig(**FACTS))
    assert path.endswith("CPUAttentionBackend")


@pytest.mark.parametrize(
    ("extras", "words"), [({"alibi_slopes": [0.5] * 4}, "alibi_slopes"), ({"chunk_lookback": 0}, "chunk_lookback=0")]
)
def test_what_a_layer_asks_for_and_nobody_knows(extras: dict[str, Any], words: str, config: Any) -> None:
    with set_current_vllm_config(config), pytest.raises(AttnError, match=words):
        AttnImpl(4, 32, 0.2, 2, **extras)


def test_an_engine_does_not_start(ours: Callable[..., Generated]) -> None:
    with pytest.raises(ValueError, match="feature_unsupported") as refused:
        ours("gemma2", "guest")
    assert "sliding_window" in str(refused.value)
