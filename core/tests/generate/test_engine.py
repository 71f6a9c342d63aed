"""The engine on a tiny model: guesses and graphs change no token, mixed plans split, devices and caches are checked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from attn_core import register
from attn_core.errors import AttnError, CacheFullError, ConfigError, ModelFolderError, UsageError
from attn_core.generate import session as session_module
from attn_core.generate.decode_graphs import batch_sizes
from attn_core.generate.engine import StepFigures
from attn_core.generate.session import MIB, Queue, ServingOptions, Session, allocate, num_pages, pick_device
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.torch_native.backend import TorchNativeBackend

PROMPTS = ["ab ab ab", "a table, a chair, a table", "xyz"]

#: torch_native under another name, which declares what its code can do on a CPU too: graphs, driven eagerly there
MANIFEST = """
schema = 1
name = "other"
protocol = ">=1.0,<2"
summary = "torch_native by another name"
[[supports]]
phases = ["prefill", "decode", "verify"]
device = "cpu"
kind = "mha"
dtypes = ["float32"]
kv_dtypes = ["auto"]
head_dims = "any"
page_sizes = "any"
kv_layouts = ["NHD"]
features = ["cuda_graph", "verify_chain"]
"""


class Other(TorchNativeBackend):
    name = "other"


@pytest.fixture(autouse=True)
def other() -> Iterator[None]:
    with register(Other, MANIFEST):
        yield


def silent(_what: str, _done: int, _total: int) -> None:
    return None


def serve(folder: Path, sampling: dict[str, Any] | None = None, **options: Any) -> tuple[Session, list[list[int]]]:
    torch.set_num_threads(1)
    queue = Queue(ServingOptions(model=str(folder), **{"device": "cpu", **options}), silent)
    requests = [queue.add(prompt, {"max_new_tokens": 30, **(sampling or {})}) for prompt in PROMPTS]
    session = Session(queue, silent)
    assert session.engine.run()
    return session, [request.generated for request in requests]


NATIVE = {"backends": {"prefill": "torch_native", "decode": "torch_native", "verify": "torch_native"}}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.05, "seed": 3}], ids=["greedy", "drawn"])
def test_guesses_change_no_token(sampling: dict[str, Any], tiny_folder: Path) -> None:
    _, wanted = serve(tiny_folder, sampling, **NATIVE)
    session, tokens = serve(tiny_folder, sampling, **NATIVE, speculative_num_draft_tokens=4)
    assert tokens == wanted
    figures = session.engine.figures
    assert session.witness.by_phase()["verify"] == ("torch_native",)
    assert 0 < figures.accepted < figures.guessed, "right and wrong guesses were both met"
    assert sum(f.new_tokens for f in figures.by_mode.values()) == sum(map(len, tokens))


def test_graphs_change_no_token_and_replay_at_every_size(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted = serve(tiny_folder, **NATIVE)
    sizes: list[int] = []
    original = session_module.DecodeGraphs.forward

    def counted(self: Any, tokens: Any, batch: Any) -> Any:
        sizes.append(batch.batch_size)
        return original(self, tokens, batch)

    monkeypatch.setattr(session_module.DecodeGraphs, "forward", counted)
    session, tokens = serve(tiny_folder, backends={"prefill": "other", "decode": "other"}, cuda_graph=True)
    assert tokens == wanted
    assert sizes.count(3) == session.engine.figures.by_mode[ForwardMode.DECODE].steps == 29
    assert session.witness.by_phase()["decode"] == ("other",)


def test_a_model_that_cannot_be_captured_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("attn_core.generate.model.PagedModel.run", wait)
    with pytest.raises(ConfigError, match="cannot be captured: operation not permitted"):
        serve(tiny_folder, backends={"prefill": "other", "decode": "other"}, cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graphs"])
def test_a_gpu_gives_the_tokens_of_the_cpu(graph: bool, tiny_folder: Path) -> None:
    _, wanted = serve(tiny_folder, **NATIVE)
    session, tokens = serve(tiny_folder, **NATIVE, device="cuda", dtype="float32", cuda_graph=graph)
    assert tokens == wanted
    assert session.cache.device.type == "cuda"


def test_graphs_that_no_backend_has_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(AttnError, match="cuda_graph"):
        serve(tiny_folder, **NATIVE, cuda_graph=True)


def test_a_mixed_step_is_split_between_two_backends(tiny_folder: Path) -> None:
    _, wanted = serve(tiny_folder, **NATIVE)
    session, tokens = serve(
        tiny_folder, backends={"prefill": "torch_native", "decode": "other"}, max_batch_tokens=16, max_requests=4
    )
    assert tokens == wanted
    assert ForwardMode.MIXED in session.engine.figures.by_mode
    assert session.witness.by_phase() == {"prefill": ("torch_native",), "decode": ("other",)}


def test_figures_add_up(tiny_folder: Path) -> None:
    session, tokens = serve(tiny_folder, **NATIVE, page_size=4)
    figures = session.engine.figures
    assert figures.prompt_tokens == sum(map(len, PROMPTS))
    assert sum(f.new_tokens for f in figures.by_mode.values()) == sum(map(len, tokens)) == 90
    assert figures.peak_pages == sum(-(-(len(prompt) + 29) // 4) for prompt in PROMPTS)
    assert figures.first_token_seconds is not None
    assert figures.first_token_seconds <= sum(f.seconds for f in figures.by_mode.values()) + 1


def folder_of(model: Any, tokenizer_of: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


TEXT = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip


def mllama() -> Any:
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
              "attention_heads": 2, "image_size": 28, "patch_size": 7, "max_num_tiles": 1, "vision_output_dim": 64,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(text_config=text, vision_config=vision))


def gemma3() -> Any:
    text = {**TEXT, "num_hidden_layers": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": None}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7, "vision_use_head": False}  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def gemma2() -> Any:
    more = {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8, "attn_logit_softcapping": 5.0}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**TEXT, **more, query_pre_attn_scalar=24))


def gpt_oss() -> Any:
    more = {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8, "num_local_experts": 4}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, **more, num_experts_per_tok=2))


def deepseek_v3() -> Any:
    more = {"num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
            "topk_group": 1}  # fmt: skip
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**TEXT, **more}))


@pytest.mark.parametrize("make", [gemma2, gpt_oss, deepseek_v3, mllama, gemma3])
def test_folders_of_other_architectures_generate_what_their_own_code_would(
    make: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """Windows, soft caps, sinks, latents from a folder; models with images from text alone."""
    model = make()
    session, tokens = serve(folder_of(model, tiny_folder, tmp_path / "model"))
    model.eval().set_attn_implementation("eager")
    for prompt, generated in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([[*session.queue.encode(prompt, raw=True), *generated]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == generated


def test_a_model_that_needs_an_image_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = hf.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 16, "num_hidden_layers": 1, "model_type": "gemma"},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 7, "projection_dim": 64, "model_type": "siglip_vision_model"},
        projection_dim=64,
    )  # fmt: skip
    folder = folder_of(hf.PaliGemmaForConditionalGeneration(config), tiny_folder, tmp_path / "model")
    with pytest.raises(ModelFolderError, match="does not generate from text alone"):
        serve(folder)


def test_a_rate_without_time_is_zero() -> None:
    assert StepFigures().tokens_per_second == 0


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (16, [1, 2, 4, 8, 16])])
def test_graphs_are_captured_of_powers_of_two_and_the_largest(largest: int, sizes: list[int]) -> None:
    assert batch_sizes(largest) == sizes


CONFIG = AttentionConfig(
    layers=(LayerKind(4, 2, 16, 16, layer_ids=(0, 1)),), dtype="float32", page_size=16, kv_layout="NHD"
)


def test_a_cache_has_the_pages_that_its_size_holds() -> None:
    assert KVCache.bytes_per_page(CONFIG) == 2 * 2 * 2 * 16 * 16 * 4
    assert num_pages(CONFIG, "cpu", 1) == MIB // 8192
    assert num_pages(CONFIG, "cpu", None) == 64 * MIB // 8192
    assert num_pages(CONFIG, "cuda", None) == 1024 * MIB // 8192


def test_impossible_caches_are_refused() -> None:
    with pytest.raises(ConfigError):
        num_pages(CONFIG, "cpu", -1)
    with pytest.raises(CacheFullError, match="--cache-mib"):
        num_pages(CONFIG.replace(page_size=8192), "cpu", 1)
    with pytest.raises(CacheFullError, match="cannot be allocated"):
        allocate(CONFIG, 2**45, "cpu")


HERE: dict[str, tuple[System, bool, str | None, str | None]] = {
    "a CPU machine": (System("cpu"), False, None, "cpu"),
    "a GPU that torch can use": (System("cuda", "sm_90"), True, None, "cuda"),
    "a GPU that torch cannot use": (System("cuda", "sm_90"), False, None, "cpu"),
    "the CPU of a GPU machine": (System("cuda", "sm_90"), True, "cpu", "cpu"),
    "an AMD GPU, which torch calls cuda": (System("rocm", "gfx942"), True, None, "cuda"),
    "a GPU that is not there": (System("cpu"), False, "cuda", None),
    "a GPU that this torch was not built for": (System("cuda", "sm_90"), False, "cuda", None),
    "another accelerator": (System("cuda", "sm_90"), True, "npu", None),
}


@pytest.mark.parametrize("machine", HERE)
def test_the_device_is_what_is_here(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, usable, asked, chosen = HERE[machine]
    monkeypatch.setattr(session_module, "detect", lambda force=None: System("cpu") if force == "cpu" else here)
    monkeypatch.setattr(session_module, "is_usable", lambda device: device == "cpu" or usable)
    if chosen is None:
        with pytest.raises(UsageError, match="cannot be used here"):
            pick_device(asked)
        return
    device, system = pick_device(asked)
    assert device == chosen
    assert system.device == ("cpu" if chosen == "cpu" else here.device)
