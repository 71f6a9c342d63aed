"""A GGUF file becomes the model it was made from: weights, config, tokenizer; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from attn_core.errors import ModelFolderError
from attn_core.generate.gguf import convert
from attn_core.generate.session import Queue, ServingOptions, Session
from gguf import GGMLQuantizationType as Quantization
from gguf import GGUFWriter, dequantize, quantize

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 64, 2
CONTROL = "<|end|>"


def tiny_model(**more: Any) -> Any:
    config = hf.LlamaConfig(
        vocab_size=259, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, initializer_range=0.2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4}, **more,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (0, D/2, 1, D/2 + 1, ...) of each head, so that rope turns neighbours."""
    half = weight.shape[0] // heads // 2
    rows = [h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)]
    return weight[rows]


def byte_vocabulary() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's vocabulary, one merge, and a control token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_gguf(path: Path, model: Any, *, stored: Quantization = Quantization.F32, **changes: Any) -> Path:
    """``model`` as llama.cpp's converter writes it; ``changes`` overwrite metadata (None leaves a field out)."""
    config = model.config
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_name("tiny")
    tokens = [*byte_vocabulary(), "he", "ll", CONTROL]
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [1] * 258 + [3],
        "token_merges": ["h e", "l l"],
        "bos_token_id": 258,
        "eos_token_id": 258,
        "unk_token_id": 258,
        "add_bos_token": False,
        **changes,
    }
    for name, value in metadata.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    for name, tensor in gguf_tensors(model).items():
        if tensor.ndim == 1 or stored is Quantization.F32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    tensors = {}
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        weight = value.numpy()
        if stem in WHOLE:
            if stem == "lm_head" and model.config.tie_word_embeddings:
                continue
            tensors[f"{WHOLE[stem]}.weight"] = weight
            continue
        _, _, layer, inner = stem.split(".", 3)
        if inner in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = llama_cpp_order(weight, HEADS if "q_proj" in inner else KV_HEADS)
        tensors[f"blk.{layer}.{NAMES[inner]}.weight"] = weight
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (made := tmp_path / "model").mkdir()
    return made


def silent(_done: int, _total: int) -> None:
    return None


@pytest.mark.parametrize("tied", [False, True])
def test_the_converted_model_is_the_original(tied: bool, tmp_path: Path, folder: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    convert(write_gguf(tmp_path / "tiny.gguf", model), folder, silent)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 259, (1, 20))
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_quantized_tensors_come_out_as_the_gguf_package_reads_them(tmp_path: Path, folder: Path) -> None:
    model = tiny_model()
    convert(write_gguf(tmp_path / "tiny.gguf", model, stored=Quantization.Q8_0), folder, silent)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    original = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = dequantize(quantize(original, Quantization.Q8_0), Quantization.Q8_0)
    assert np.array_equal(loaded.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)
    assert not np.array_equal(expected, original)


def test_progress_counts_every_tensor(tmp_path: Path, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = tiny_model()
    convert(write_gguf(tmp_path / "tiny.gguf", model), folder, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 21) for i in range(1, 22)]


def test_text_is_cut_as_the_file_says(tmp_path: Path, folder: Path) -> None:
    convert(write_gguf(tmp_path / "tiny.gguf", tiny_model()), folder, silent)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("hello 12") == ["he", "ll", "o", "Ġ", "1", "2"]
    assert tokenizer(f"o{CONTROL}")["input_ids"] == [ord("o"), 258]
    assert tokenizer.decode(tokenizer("hello, é")["input_ids"]) == "hello, é"


def test_a_bos_token_is_added_where_the_file_says_so(tmp_path: Path, folder: Path) -> None:
    convert(write_gguf(tmp_path / "tiny.gguf", tiny_model(), add_bos_token=True), folder, silent)
    assert hf.AutoTokenizer.from_pretrained(folder)("o")["input_ids"] == [258, ord("o")]


def test_text_is_generated_from_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(1)
    model = tiny_model()
    source = write_gguf(tmp_path / "tiny.gguf", model)
    queue = Queue(ServingOptions(model=str(source), device="cpu"), lambda *_: None)
    request = queue.add("hello", {"max_new_tokens": 10})
    assert Session(queue, lambda *_: None).engine.run()
    assert request.tokens[:3] == [256, 257, ord("o")]
    with torch.inference_mode():
        logits = model(torch.tensor([request.tokens])).logits[0]
    assert logits[2:-1].argmax(-1).tolist() == request.generated


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architecture": "qwen2"}, "architecture 'qwen2'"),
    "scaled rope": ({"rope_scaling_type": type("Type", (), {"value": "yarn"})}, "rope scaling 'yarn'"),
    "a pre-tokenizer that is not known": ({"tokenizer_pre": "deepseek-llm"}, "cuts text in the manner 'deepseek-llm'"),
    "missing metadata": ({"feed_forward_length": None}, "lacks the metadata"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, tmp_path: Path, folder: Path) -> None:
    changes, message = REFUSED[what]
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model(), **changes)
    with pytest.raises(ModelFolderError, match=message):
        convert(source, folder, silent)


def test_a_tensor_that_a_plain_llama_has_not_is_refused(tmp_path: Path, folder: Path) -> None:
    model = tiny_model()
    source = tmp_path / "tiny.gguf"
    original: Callable[[Any], dict[str, np.ndarray]] = gguf_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "gguf_tensors", lambda m: {**original(m), "rope_freqs.weight": np.ones(8, np.float32)})
        write_gguf(source, model)
    with pytest.raises(ModelFolderError, match="rope_freqs"):
        convert(source, folder, silent)


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 5000, -1, -4000])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path, folder: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    whole = source.read_bytes()
    source.write_bytes(whole[:kept])
    with pytest.raises(ModelFolderError, match="no complete GGUF file"):
        convert(source, folder, silent)


def test_a_file_without_tensors_is_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "gguf_tensors", lambda _model: {})
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    with pytest.raises(ModelFolderError, match="its 0 tensors"):
        convert(source, folder, silent)


def test_a_file_of_something_else_is_refused(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "text.gguf"
    source.write_text("not a model" * 100)
    with pytest.raises(ModelFolderError, match="no complete GGUF file"):
        convert(source, folder, silent)
