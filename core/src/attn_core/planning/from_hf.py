"""From a Hugging Face config to an AttentionConfig: which layer kinds each known architecture has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_core.errors import ModelFolderError, UnknownModelError, nearest
from attn_core.planning.config import AttentionConfig
from attn_core.planning.families import FAMILIES, Family
from attn_core.planning.hf_fields import Fields

#: How transformers writes the dtypes that a model can be served in.
_DTYPES = {"float16": "float16", "half": "float16", "bfloat16": "bfloat16", "float32": "float32", "float": "float32"}


def config_from_hf(source: Mapping[str, Any] | str | Path) -> AttentionConfig:
    """The attention of a model, from a parsed config.json, its path, or the folder it lies in.

    Keys that are missing have the defaults of the transformers library. A config that names no dtype is float32, as
    transformers loads it. What an architecture does not have in common with the contract is refused, never dropped.
    Towers whose attention the contract can express (SigLIP, Whisper's encoder) are ragged layers with no layer ids;
    ``without_towers()`` of the result is for engines that run them by themselves.
    Raises ModelFolderError for a source that cannot be read, UnknownModelError for an architecture that is not known,
    ConfigError for a key with an impossible value, or one that asks for attention that the contract does not define.
    """
    data = source if isinstance(source, Mapping) else read_config(Path(source))
    family = _family(data)
    fields = Fields(data, family.filled, family.model_type)
    parts = family.read(fields)
    return AttentionConfig(
        layers=parts.layers,
        dtype=_dtype(data),
        max_context_len=parts.max_context_len,
        bidirectional_spans=parts.bidirectional_spans,
        multimodal=parts.multimodal,
        model=str(data.get("_name_or_path") or family.model_type),
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """The parsed config.json at ``path``, or in the folder ``path``. Raises ModelFolderError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"there is no {file}", given=str(path), accepted="a config.json, or a folder with one"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{file} cannot be read: {error}", given=str(path), accepted="JSON in UTF-8") from error
    if not isinstance(data, dict):
        raise ModelFolderError(f"{file} holds no JSON object", given=str(path), accepted="a model's config.json")
    return data


def _family(data: Mapping[str, Any]) -> Family:
    """By architecture where the config names one, else by model type."""
    architectures = {name: family for family in FAMILIES for name in family.architectures}
    types = {family.model_type: family for family in FAMILIES}
    named = data.get("architectures")
    if isinstance(named, list) and named:
        given, known = str(named[0]), architectures
    else:
        given, known = str(data.get("model_type") or ""), types
    if given in known:
        return known[given]
    near = nearest(given, known)
    raise UnknownModelError(
        f"architecture {given!r} is not known" if given else "the config names neither architectures nor a model_type",
        given=given,
        accepted=sorted(known),
        hint=f"the nearest is {near!r}; or describe the layers in an AttentionConfig" if near
        else "describe the layers in an AttentionConfig",
    )  # fmt: skip


def _dtype(data: Mapping[str, Any]) -> str:
    nested = data.get("text_config")
    found = [
        at.get(key) for at in (data, nested if isinstance(nested, Mapping) else {}) for key in ("dtype", "torch_dtype")
    ]
    name = str(next(filter(None, found), "float32")).removeprefix("torch.")
    return _DTYPES.get(name, name)  # an unknown one is refused by AttentionConfig, with what it accepts
