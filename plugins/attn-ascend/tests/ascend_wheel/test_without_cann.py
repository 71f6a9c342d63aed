"""A machine with the real torch-npu and without CANN: `import torch` fails there, and `attn` works all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Python as a user has it there: nothing hides the wheel from torch, and no stubs stand in for CANN."""
    hidden = ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")
    own = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, *arguments], env={**own, **environ}, cwd=folder, capture_output=True, text=True, check=False
    )


def test_torch_itself_fails_there(tmp_path: Path) -> None:
    """The control, and why attn-ascend does not bring torch-npu along."""
    done = run(tmp_path, "-c", "import torch")
    assert done.returncode != 0
    assert "torch_npu" in done.stderr


def test_backends_are_listed(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "attn_core", "list-backends", "--json")
    found = {entry["name"]: entry for entry in json.loads(done.stdout)["backends"]}
    assert (found["ascend"]["distribution"], found["ascend"]["usable"]) == ("attn-ascend", False)


def test_a_plan_for_a_card_is_explained(tmp_path: Path) -> None:
    asked = ("-m", "attn_core", "explain", "gpt-oss-120b", "--attention-backend", "ascend")
    done = run(tmp_path, *asked, ATTN_FORCE_SYSTEM="npu:ascend910b")
    assert done.returncode == 0
    assert "decode   ascend" in done.stdout


def test_a_plan_for_this_machine_is_refused_with_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "attn_core", "explain", "gpt-oss-120b", "--attention-backend", "ascend")
    assert done.returncode != 0
    assert "device_mismatch" in done.stdout + done.stderr
