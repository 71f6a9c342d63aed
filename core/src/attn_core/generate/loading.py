"""Loads a model folder through transformers: weights onto the device, and the tokenizer."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from attn_core.errors import ModelFolderError
from attn_core.generate.weights import ModelFiles, Progress, require_packages
from attn_core.runtime.kv_cache import TORCH_DTYPES

#: the releases whose attention and cache calls the adapters were run against: the first, and the first that is not
TRANSFORMERS: Final = ((5, 17), (5, 24))
#: parts of the names of tensors that generating text has no use for; the last one is computed from the config
NOT_FOR_TEXT: Final = ("vision", "visual", "image", "multi_modal", "multimodal", "audio", "rotary_emb.inv_freq")


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
    """transformers' config of the folder, a language model's with weights in floating point.

    Raises ModelFolderError for one that transformers cannot read or does not know as a language model.
    """
    check_transformers()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(files.folder), local_files_only=True)
    except Exception as error:
        raise _unreadable(files.folder, "config.json", error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ModelFolderError(
            f"{files.name} is of type {config.model_type}, which does not generate from text alone",
            given=config.model_type,
            accepted="decoder-only language models",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelFolderError(f"{files.name} has quantized weights", accepted="float16, bfloat16 or float32")
    return config


def load_model(files: ModelFiles, config: Any, *, dtype: str, device: str, progress: Progress) -> Any:
    """The language model of the folder, in ``dtype``, on ``device``, in evaluation mode.

    ``config`` is ``read_config``'s. Weights are mapped from the file and copied once. Raises ModelFolderError for
    weights that are damaged or incomplete, and for more weights than the model's code has a use for.
    """
    from transformers import AutoModelForCausalLM

    _report_loading(progress)
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
    _check_complete(files.folder, report)
    return model.to(torch.device(device)).eval()


def load_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer of the folder. Raises ModelFolderError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(files.folder), local_files_only=True)
    except Exception as error:
        raise _unreadable(files.folder, "the tokenizer", error) from error


def stop_ids(files: ModelFiles, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: those that the folder's configs name, and the tokenizer's own."""
    ids = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        named = _json(files.folder / name).get("eos_token_id")
        ids.update(named if isinstance(named, list) else [named])
    return frozenset(i for i in ids if isinstance(i, int))


def suggested_sampling(files: ModelFiles) -> dict[str, Any]:
    """How the folder's generation config would have its model sampled, beyond greedy; it is not followed here."""
    suggested = _json(files.folder / "generation_config.json")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if suggested.get("do_sample") else ()
    return {name: suggested[name] for name in names if suggested.get(name) not in (None, 1)}


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Raise ModelFolderError unless the folder had the model's tensors and no others, but those of images and sound."""
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    unused = [name for name in sorted(report["unexpected_keys"]) if not any(part in name for part in NOT_FOR_TEXT)]
    if missing or unused:
        problem = f"lacks {len(missing)} tensors of the model, such as {missing[0]}" if missing else ""
        problem = problem or f"has {len(unused)} tensors that the model's code does not use, such as {unused[0]}"
        raise ModelFolderError(
            f"{folder} {problem}",
            accepted="the weights of the architecture and sizes that config.json names",
            hint="copy or download the folder again",
        )


def _report_loading(progress: Progress) -> None:
    """Have transformers count the tensors that it loads into ``progress``, in place of its own bar and warnings."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    def count(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _counted(args[0], progress) if args else make(*args, **kwargs)

    logging.set_verbosity_error()  # what it would warn of is checked here
    logging.disable_progress_bar()
    progress("loading weights", 0, 1)
    if hasattr(logging, "set_tqdm_hook"):  # since transformers 5.18
        logging.set_tqdm_hook(count)


def _counted(items: Iterable[Any], progress: Progress) -> Iterator[Any]:
    everything = list(items)
    for done, item in enumerate(everything, 1):
        yield item
        progress("loading weights", done, len(everything))


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(path.parent, path.name, error) from error
    return data if isinstance(data, dict) else {}


def _unreadable(folder: Path, what: str, error: Exception) -> ModelFolderError:
    lines = str(error).strip().splitlines() or [""]
    return ModelFolderError(
        f"{folder}: {what} cannot be loaded: {type(error).__name__}: {lines[0]}",
        given=str(folder),
        accepted="a whole Hugging Face folder of a decoder-only model",
        hint="copy or download the folder again, and look at its config.json",
    )
