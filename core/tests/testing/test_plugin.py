"""The pytest plugin and the three lines of an author, each in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_plugin_works_in_an_empty_folder(tmp_path: Path) -> None:
    ran = run_pytest(
        tmp_path, "-p", "attn_core.testing.plugin", "--attn-backend", "torch_native", "-k", "draft_extend and joined"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "attn conformance" in ran.stdout
    assert "draft" in ran.stdout


def test_three_lines_are_a_conformance_test(tmp_path: Path) -> None:
    text = "from attn_core.testing import conformance\n\ntest_conformance = conformance('torch_native')\n"
    (tmp_path / "test_conformance.py").write_text(text)
    ran = run_pytest(tmp_path, "-k", "draft_extend and joined")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


def test_an_unknown_backend_is_said_before_anything_is_collected(tmp_path: Path) -> None:
    ran = run_pytest(tmp_path, "-p", "attn_core.testing.plugin", "--attn-backend", "torch_nativ")
    assert ran.returncode != 0
    assert "torch_nativ" in ran.stdout + ran.stderr


@pytest.mark.parametrize("module", ["attn_core.testing", "attn_core.testing.proof"])
def test_reading_evidence_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
