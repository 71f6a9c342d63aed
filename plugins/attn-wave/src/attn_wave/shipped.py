"""Where code objects come from: shipped with this package, compiled before on this machine, or compiled now."""

from __future__ import annotations

import json
import lzma
import os
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from attn_wave.compiler import WAVE_VERSION, Compiled, compile_variant, sha256, sources, sources_hash, wave_version
from attn_wave.join_variant import AnyVariant, kernel_of

ARCHITECTURES: Final = ("gfx942", "gfx950")


@cache
def code_of(variant: AnyVariant, arch: str) -> Compiled:
    """The code object of ``variant``, compiled only where neither this package nor the cache has it.

    Raises PluginLoadError if it must be compiled and wave-lang is missing, KernelError if that fails.
    """
    return shipped(variant, arch) or _cached(variant, arch) or _compile(variant, arch)


@cache
def index(arch: str) -> dict[str, Any]:
    """What is shipped for ``arch``: the versions that it was compiled with, and the facts about each kernel."""
    path = files("attn_wave") / "shipped" / arch / "index.json"
    if not path.is_file():
        return {"versions": {}, "kernels": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def is_current(arch: str) -> bool:
    """Whether what is shipped was compiled from these sources."""
    return bool(index(arch)["versions"] == {"sources": sources(), "wave-lang": WAVE_VERSION})


def shipped(variant: AnyVariant, arch: str) -> Compiled | None:
    """The code object that this package ships, None if there is none or it is of other sources."""
    record = index(arch)["kernels"].get(variant.key)
    path = files("attn_wave") / "shipped" / arch / f"{variant.key}.hsaco.xz"
    if record is None or not is_current(arch) or not path.is_file():
        return None
    return _loaded(record, lzma.decompress(path.read_bytes()))


def cache_folder(kernel: str, arch: str) -> Path:
    """Where this machine keeps what it compiled: by sources, Wave's version and chip, below ATTN_CACHE_DIR."""
    base = os.environ.get("ATTN_CACHE_DIR")
    home = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attn"
    return home / "wave" / f"{sources_hash(kernel)}-{wave_version()}" / arch


def _cached(variant: AnyVariant, arch: str) -> Compiled | None:
    record = cache_folder(kernel_of(variant), arch) / f"{variant.key}.json"
    blob = record.with_suffix(".hsaco")
    if not (record.is_file() and blob.is_file()):
        return None
    try:
        return _loaded(json.loads(record.read_text(encoding="utf-8")), blob.read_bytes())
    except (OSError, ValueError):  # a file that another process removes, or one cut short
        return None


def _compile(variant: AnyVariant, arch: str) -> Compiled:
    made = compile_variant(variant, arch)
    folder = cache_folder(kernel_of(variant), arch)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{variant.key}.hsaco", made.blob)
    _replace(folder / f"{variant.key}.json", json.dumps(made.record()).encode())
    return made


def _replace(path: Path, content: bytes) -> None:
    """At once: another process may read it now, or write the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def _loaded(record: dict[str, Any], blob: bytes) -> Compiled | None:
    """None for a file that is not what its record says: it is then compiled again."""
    if record.get("sha256") != sha256(blob):
        return None
    x, y, z = record["block"]
    facts = {k: v for k, v in record.items() if k not in ("name", "block", "sha256")}
    return Compiled(blob, record["name"], (x, y, z), facts)
