"""Measured times that `auto` ranks by: the file that `attn tune` writes for a device, and how a plan reads it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from attn_core.errors import UsageError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.ranking import Rankings
from attn_core.planning.system import System

SCHEMA: Final = "attn/tuned"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one layer's call of ``backend`` (its name) on the workloads of ``shape`` (see ``shape_key``).

    version: of the backend's distribution when it was measured; another version is another kernel and not ranked by it.
    """

    shape: str
    backend: str
    version: str
    seconds: float


def shape_key(config: AttentionConfig, kind: LayerKind, phase: Phase) -> str:
    """What a measurement is filed under: everything that changes which kernel runs, but not the page size.

    >>> shape_key(AttentionConfig((LayerKind(32, 8, 128, 128),)), LayerKind(32, 8, 128, 128), "decode")
    'decode mha 32/8 128/128 bfloat16 kv=auto'
    """
    words = [phase, kind.kind, f"{kind.num_q_heads}/{kind.num_kv_heads}", f"{kind.qk_head_dim}/{kind.v_head_dim}"]
    words += [config.dtype, f"kv={config.kv_cache_dtype}"]
    words += [f"window={kind.sliding_window}"] if kind.sliding_window else []
    words += [f"+{name}" for name in sorted(config.features(kind, phase) - {"sliding_window"})]
    return " ".join(words)


def tuned_path(system: System) -> str:
    """Where the times of ``system`` lie: ``tuned/<system>.json`` in ATTN_CACHE_DIR or the user's cache folder."""
    base = os.environ.get("ATTN_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "attn"
    )
    return os.path.join(base, "tuned", re.sub(r"[^a-z0-9_]+", "-", str(system).lower()) + ".json")


def load_timings(path: str) -> tuple[Timing, ...]:
    """The timings in the file, none if there is no file. Raises UsageError for one that cannot be read as such."""
    try:
        with open(path, encoding="utf-8") as stream:
            data: dict[str, Any] = json.load(stream)
        if data["schema"] != SCHEMA or data["version"] != 1:
            raise ValueError(f"schema {data['schema']} version {data['version']}")
        return tuple(Timing(**entry) for entry in data["timings"])
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no file of measured times: {error}",
            accepted=f"{SCHEMA} version 1",
            hint="attn tune writes it anew",
        ) from error


def save_timings(path: str, new: Iterable[Timing], *, device: str, date: str) -> None:
    """Put ``new`` into the file, in place of older ones of the same shape and backend; all or nothing."""
    merged = {(t.shape, t.backend): t for t in (*load_timings(path), *new)}
    data = {"schema": SCHEMA, "version": 1, "device": device, "date": date}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path), suffix=".tmp", delete=False) as stream:
        json.dump({**data, "timings": [asdict(t) for t in merged.values()]}, stream, indent=1)
    os.replace(stream.name, path)


def rankings_from(timings: Iterable[Timing], versions: Mapping[str, str]) -> Rankings:
    """Ranks by these timings, where ``versions`` says that the backend (by its listed name) is still what was measured.

    A backend's time for a config is the sum over its layers; it counts only if every kind of layer was measured.
    """
    known = {(t.shape, t.backend): t.seconds for t in timings if versions.get(t.backend) == t.version}
    backends = {backend for _, backend in known}

    def ranked(config: AttentionConfig, phase: Phase, system: System) -> Mapping[str, float]:
        kinds = config.kinds(phase)
        found: dict[str, float] = {}
        for backend in backends:
            times = [known.get((shape_key(config, kind, phase), backend)) for kind in kinds]
            layers = [max(1, len(kind.layer_ids)) for kind in kinds]
            if times and all(t is not None for t in times):
                found[backend] = sum(t * n for t, n in zip(times, layers, strict=True) if t is not None)
        return found

    return ranked
