"""Where code objects come from: shipped, cached by versions, or compiled; damaged files are not believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from attn_core.errors import KernelError, PluginLoadError
from attn_wave import compiler, shipped
from attn_wave.compiler import Compiled, compile_variant
from attn_wave.variant import Variant

ARCH = "gfx942"
OTHER = Variant(80, 80, "float16", 16)


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was compiled, with an empty cache and a compiler that gives the number of the call."""
    calls: list[str] = []

    def fake(variant: Variant, arch: str) -> Compiled:
        calls.append(f"{variant.key} for {arch}")
        return Compiled(b"code %d" % len(calls), "attend", (64, 1, 1), {"vgprs": len(calls)})

    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(shipped, "compile_variant", fake)
    shipped.code_of.cache_clear()
    yield calls
    shipped.code_of.cache_clear()


def code(variant: Variant = OTHER, arch: str = ARCH) -> Compiled:
    """As a new process finds it."""
    shipped.code_of.cache_clear()
    return shipped.code_of(variant, arch)


def test_what_is_shipped_is_taken_as_it_is(compiled: list[str]) -> None:
    assert code(Variant(64, 64, "float16", 16)).blob[:4] == b"\x7fELF"
    assert compiled == []


def test_what_is_not_is_compiled_once(compiled: list[str]) -> None:
    first, second = code(), code()
    assert (first.blob, first.facts) == (second.blob, second.facts) == (b"code 1", {"vgprs": 1})
    assert compiled == ["80x80-float16-16 for gfx942"]


def test_each_chip_has_its_own(compiled: list[str]) -> None:
    assert code().blob != code(arch="gfx950").blob


@pytest.mark.parametrize("what", ["wave_version", "sources_hash"])
def test_another_version_compiles_anew(what: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code()
    monkeypatch.setattr(shipped, what, lambda *asked: "other")
    assert code().blob == b"code 2"


@pytest.mark.parametrize("suffix", [".hsaco", ".json"])
def test_a_damaged_file_is_compiled_anew(suffix: str, compiled: list[str], tmp_path: Path) -> None:
    code()
    (path,) = tmp_path.rglob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-3])
    assert code().blob == b"code 2"
    assert code().blob == b"code 2"


def test_a_shipped_file_that_is_not_what_was_proved_is_not_taken(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads(json.dumps(shipped.index(ARCH)))
    variant = Variant(64, 64, "float16", 16)
    index["kernels"][variant.key]["sha256"] = "0" * 64
    monkeypatch.setattr(shipped, "index", lambda arch: index)
    assert code(variant).blob == b"code 1"


def test_shipped_files_of_other_sources_are_not_taken(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "sources", lambda: {"attend": "other"})
    assert code(Variant(64, 64, "float16", 16)).blob == b"code 1"


def test_the_folder_is_that_of_the_core_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    assert shipped.cache_folder("attend", ARCH).is_relative_to(tmp_path / "wave")
    monkeypatch.delenv("ATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert shipped.cache_folder("attend", ARCH).is_relative_to(tmp_path / "xdg" / "attn")


def test_without_the_compiler_it_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "wave_version", lambda: None)
    with pytest.raises(PluginLoadError, match="wave-lang is not here"):
        compile_variant(OTHER, ARCH)


def test_what_the_compiler_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    def fails(*asked: object) -> None:
        raise ValueError("no such layout")

    monkeypatch.setattr(compiler, "wave_version", lambda: compiler.WAVE_VERSION)
    monkeypatch.setitem(sys.modules, "attn_wave.kernels.build", SimpleNamespace(build=fails))
    with pytest.raises(KernelError, match="for gfx942: no such layout"):
        compile_variant(OTHER, ARCH)
