"""Installed anywhere, the plugin lists and explains and breaks nobody: it neither imports nor requires wave-lang."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

import pytest
from attn_core.planning.discovery import discover
from attn_core.testing.devices import load_emulator
from attn_wave import runtime
from attn_wave.compiler import WAVE_VERSION
from attn_wave.emulator.device import Gfx942


def test_it_is_listed_with_its_manifest() -> None:
    ref = next(ref for ref in discover().backends if ref.name == "wave")
    assert (ref.dist, ref.manifest.needs_host_lengths) == ("attn-wave", True)


def test_the_distribution_does_not_pull_the_compiler_in() -> None:
    needed = [requirement for requirement in requires("attn-wave") or [] if "extra ==" not in requirement]
    assert not [requirement for requirement in needed if "wave-lang" in requirement or "numpy" in requirement]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("attn_wave", "torch"), ("attn_wave.backend", "wave_lang"), ("attn_wave.backend", "attn_wave.emulator"),
     ("attn_wave.emulator.device", "wave_lang")],
)  # fmt: skip
def test_importing_it_imports_no_more_than_it_must(module: str, forbidden: str) -> None:
    code = f"import sys, {module}; sys.exit({forbidden!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_emulator_is_found_and_says_what_it_is() -> None:
    chip = load_emulator("gfx942")
    assert isinstance(chip, Gfx942)
    assert (chip.level, chip.device().type) == ("isa-emulated", "cpu")
    system = chip.system()
    assert (system.device, system.arch, system.dists["wave-lang"]) == ("rocm", "gfx942", WAVE_VERSION)
    assert "torch" in system.dists
    assert {"torch", "wave-lang"} <= set(system.dists)
    assert len(system.dists) == len(set(system.dists))


def test_the_emulator_ends_with_its_context() -> None:
    with Gfx942() as outer:
        with Gfx942() as inner:
            assert runtime.emulated is inner.runtime
        assert runtime.emulated is outer.runtime
    assert runtime.emulated is None
