"""Installed anywhere, the plugin lists and explains and breaks nobody: it neither imports nor requires torch-npu."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

import pytest
from attn_ascend.emulator.device import EMULATOR
from attn_core.planning.discovery import discover


def test_it_is_listed_with_its_manifest() -> None:
    ref = next(ref for ref in discover().backends if ref.name == "ascend")
    assert (ref.dist, ref.manifest.needs_host_lengths) == ("attn-ascend", True)


def test_the_distribution_does_not_pull_torch_npu_in() -> None:
    """torch imports every installed torch-npu by itself, and without CANN that import fails: `import torch` with it."""
    assert not [requirement for requirement in requires("attn-ascend") or [] if "npu" in requirement]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("attn_ascend", "torch"), ("attn_ascend.backend", "torch_npu"), ("attn_ascend.emulator.device", "torch_npu"),
     ("attn_ascend.doctor", "torch")],
)  # fmt: skip
def test_importing_it_imports_no_more_than_it_must(module: str, forbidden: str) -> None:
    code = f"import sys, {module}; sys.exit({forbidden!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_emulator_is_found_and_says_what_it_is() -> None:
    assert (EMULATOR.level, EMULATOR.device().type) == ("contract-emulated", "cpu")
    system = EMULATOR.system()
    assert (system.device, system.arch, system.forced) == ("npu", "ascend910b", False)
    assert system.dists["torch-npu"] == EMULATOR.versions()["torch-npu schemas"] == "2.13.0"
    assert "torch" in system.dists
    assert {"torch", "torch-npu"} <= set(system.dists)


def test_the_emulator_ends_with_its_context() -> None:
    from attn_ascend import operators

    with EMULATOR, EMULATOR:
        assert operators.emulated
    assert not operators.emulated
