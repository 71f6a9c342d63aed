"""Which code a run has proved: a hash over the files that decide what a backend computes, without importing them."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Final

from attn_core.planning.discovery import BackendRef
from attn_core.planning.filters import CORE_DISTRIBUTION

#: The files of a package that decide what it computes.
_CODE: Final = (".py", ".toml", ".json", ".so", ".xz", ".hsaco", ".cubin", ".ptx", ".cu", ".cpp")
#: The core's rooms that every backend stands on; what lists, serves, measures and proves computes no attention.
_CORE: Final = ("__init__.py", "errors.py", "planning", "runtime", "torch_native.toml")
#: The core's room of the conformance kit.
_KIT: Final = ("testing",)


def code_hashes(ref: BackendRef) -> dict[str, str]:
    """The code that took part when ``ref`` ran, by distribution: the core's, and the backend's own."""
    return {CORE_DISTRIBUTION: _hash("attn_core", _CORE), ref.dist: installed_code(ref)}


def installed_code(ref: BackendRef) -> str:
    """The hash of the package of ``ref`` as it lies here now; empty where it has no files, as in a notebook."""
    module = ref.object.partition(":")[0].partition(".")[0]
    return _hash(module, _CORE if ref.dist == CORE_DISTRIBUTION else ())


def kit_hash() -> str:
    """The code of the conformance kit: which cases there are, and what is right."""
    return _hash("attn_core", _KIT)


@cache
def _hash(module: str, rooms: tuple[str, ...] = ()) -> str:
    """Twelve digits of the SHA-256 over the files of a top-level package, or over those in ``rooms`` of it."""
    digest, none = hashlib.sha256(), True
    files = {path.relative_to(folder): path for folder in _folders(module) for path in folder.rglob("*")}
    for inner, path in sorted(files.items()):
        asked = inner.parts[0] in rooms if rooms else inner.parts[0] != "evidence"  # which a plugin may ship
        if asked and path.suffix in _CODE:
            digest.update(inner.as_posix().encode() + b"\0" + path.read_bytes())
            none = False
    return "" if none else digest.hexdigest()[:12]


def _folders(module: str) -> list[Path]:
    """Where the package lies; nowhere for one that is a single file, or of a notebook."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # __main__ of a script has no spec
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
