"""The hash of a backend's code: over the files that decide what is computed, and over nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from attn_core.planning.discovery import BackendRef, discover
from attn_core.testing.fingerprint import _hash, code_hashes, installed_code, kit_hash

NATIVE = discover().find("torch_native")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a plugin, on sys.path and never imported."""
    _hash.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "attn_hashed"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    return folder


def code(module: str = "attn_hashed") -> str:
    _hash.cache_clear()
    ref: BackendRef = replace(NATIVE, dist="attn-hashed", object=f"{module}.backend:Backend")
    return installed_code(ref)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("backend.py", True),
        ("hashed.toml", True),
        ("kernels/gfx942.hsaco", True),
        ("kernels/evidence/table.json", True),
        ("NOTES.md", False),
        ("__pycache__/backend.cpython-311.pyc", False),
        ("evidence/chip/hashed.json", False),
    ],
)
def test_a_new_file_changes_the_hash_if_it_is_code(package: Path, name: str, counts: bool) -> None:
    before = code()
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text("1")
    assert (code() != before) == counts


def test_an_edit_and_a_new_name_change_the_hash_and_going_back_does_too(package: Path) -> None:
    first, file = code(), package / "backend.py"
    file.write_text("x = 1")
    second = code()
    file.write_text("x = 2")
    third = code()
    file.rename(package / "kernel.py")
    assert len({first, second, third, code()}) == 4
    (package / "kernel.py").unlink()
    assert code() == first


@pytest.mark.parametrize("module", ["__main__", "no_such_package", "this"])
def test_what_is_no_package_has_no_hash(module: str) -> None:
    """Not that of nothing, which would be equal to every other that has none."""
    assert code(module) == ""


def test_the_core_is_what_a_backend_stands_on() -> None:
    """Not the command, nor the kit: an option of `attn generate` makes no proof of a kernel a proof of other code."""
    assert set(code_hashes(NATIVE)) == {"attn-core"}
    _hash.cache_clear()
    core = installed_code(NATIVE)
    assert core == code_hashes(replace(NATIVE, dist="attn-other", object="attn_core.x:y"))["attn-core"]
    assert len({core, kit_hash(), _hash("attn_core")}) == 3
