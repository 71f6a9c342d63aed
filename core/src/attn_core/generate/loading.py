"""Loads a model folder through transformers: weights onto the device, and the tokenizer."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any, Final

import torch

from attn_core.errors import ModelFolderError
from attn_core.generate.weights import ModelFiles, require_packages
from attn_core.runtime.kv_cache import TORCH_DTYPES

#: the releases whose attention and cache calls the adapters were run against: the first, and the first that is not
TRANSFORMERS: Final = ((5, 17), (5, 24))


def check_transformers() -> None:
    """Raise ModelFolderError unless transformers is installed in a release that the adapters are known to fit."""
    require_packages("transformers", "safetensors")
    version = importlib.metadata.version("transformers")
    first, end = TRANSFORMERS
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not first <= release < end:
        accepted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, end))}"
        raise ModelFolderError(
            f"transformers {version} is installed: its internals may differ from those that were checked",
            given=version,
            accepted=accepted,
            hint=f"pip install 'transformers{accepted}'",
        )


def read_config(files: ModelFiles) -> Any:
    """transformers' config of the folder. Raises ModelFolderError for one that transformers cannot read."""
    check_transformers()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(files.folder), local_files_only=True)
    except Exception as error:
        raise _unreadable(files.folder, "config.json", error) from error


def load_model(files: ModelFiles, *, dtype: str, device: str) -> Any:
    """The causal language model of the folder, in ``dtype``, on ``device``, in evaluation mode.

    Weights are mapped from the file and copied once. Raises ModelFolderError for weights that are damaged, incomplete
    or quantized, and for architectures that transformers does not know as language models.
    """
    config = read_config(files)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelFolderError(
            f"{files.name} has quantized weights", accepted="weights in float16, bfloat16 or float32"
        )
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(files.folder),
            config=config,
            dtype=TORCH_DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreadable(files.folder, "the weights", error) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ModelFolderError(
            f"{files.folder} lacks {len(missing)} tensors of the model, such as {missing[0]}",
            hint="copy or download the folder again",
        )
    return model.to(torch.device(device)).eval()


def load_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer of the folder. Raises ModelFolderError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(files.folder), local_files_only=True)
    except Exception as error:
        raise _unreadable(files.folder, "the tokenizer", error) from error


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those of the model's generation config and the tokenizer's own."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = set(named) if isinstance(named, (list, tuple)) else {named}
    ids.add(tokenizer.eos_token_id)
    return frozenset(i for i in ids if i is not None)


def _unreadable(folder: Path, what: str, error: Exception) -> ModelFolderError:
    lines = str(error).strip().splitlines() or [""]
    return ModelFolderError(
        f"{folder}: {what} cannot be loaded: {type(error).__name__}: {lines[0]}",
        given=str(folder),
        accepted="a whole Hugging Face folder of a decoder-only model",
        hint="copy or download the folder again, and look at its config.json",
    )
