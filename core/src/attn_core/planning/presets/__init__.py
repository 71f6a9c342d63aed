"""The models that ship as data: config.json in Hugging Face's form, with the keys that attention depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from attn_core.errors import UnknownModelError, nearest
from attn_core.planning.config import AttentionConfig
from attn_core.planning.from_hf import config_from_hf

_FOLDER: Final = os.path.dirname(__file__)
_SUFFIX: Final = ".json"


@cache
def preset_names() -> tuple[str, ...]:
    """The names of the presets, sorted."""
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in os.listdir(_FOLDER) if name.endswith(_SUFFIX)))


def preset_data(name: str) -> Mapping[str, Any]:
    """The preset as it lies on disk; ``_source`` is the public name of the model. Raises UnknownModelError."""
    if name not in preset_names():
        near = nearest(name, preset_names())
        raise UnknownModelError(
            f"there is no preset {name!r}",
            given=name,
            accepted=preset_names(),
            hint=f"did you mean {near!r}?" if near else "a config.json or a model folder will do as well",
        )
    with open(os.path.join(_FOLDER, name + _SUFFIX), encoding="utf-8") as stream:
        data = json.load(stream)
    assert isinstance(data, dict)
    return data


def load_preset(name: str) -> AttentionConfig:
    """The attention of a preset. Raises UnknownModelError, with the nearest name."""
    return config_from_hf(preset_data(name)).replace(model=name)


def config_for(model: str, **serving: Any) -> AttentionConfig:
    """What a person means by ``model``: a preset, the path of a config.json, or a model folder.

    ``serving`` are further fields of AttentionConfig. Raises UnknownModelError for a text that is neither.
    """
    if model in preset_names():
        return load_preset(model).replace(**serving)
    path = Path(model)
    if not path.exists():
        near = nearest(model, preset_names())
        raise UnknownModelError(
            f"{model!r} is neither a preset nor a file or folder",
            given=model,
            accepted=f"a config.json, a model folder, or one of: {', '.join(preset_names())}",
            hint=f"did you mean {near!r}?" if near else None,
        )
    config = config_from_hf(path)
    return config.replace(model=(path.parent if path.is_file() else path).resolve().name, **serving)
