"""Installed plugins that are not: distributions of a few files in a temporary folder, and `attn` run beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from attn_core.planning.discovery import discover

MANIFEST = """
schema = 1
name = "{name}"
protocol = ">=1.0,<2"
summary = "made for a test"
[[supports]]
phases = ["prefill", "decode"]
device = "any"
kind = "mha"
dtypes = ["float16", "bfloat16", "float32"]
head_dims = "any"
page_sizes = [1, 16]
kv_layouts = ["NHD"]
features = ["sliding_window"]
"""

BACKEND = """
from attn_core import AttentionBackend


class Backend(AttentionBackend):
    name = "{name}"

    def init_forward_metadata(self, batch): ...
    def forward_extend(self, q, k, v, layer, batch, **options): return q
    def forward_decode(self, q, k, v, layer, batch, **options): return q
"""


INSTALLED = discover()


@dataclass
class Result:
    """What a run of `attn` left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Site:
    """A folder on sys.path, to install made-up distributions in."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def plugin(
        self,
        name: str,
        *,
        dist: str | None = None,
        package: str | None = None,
        manifest: str | None = MANIFEST,
        code: str | None = BACKEND,
        entry: str | None = None,
        requires: tuple[str, ...] = (),
        hooks: str | None = None,
    ) -> Path:
        """Install the backend ``name``: package, manifest (None: without), module (None: without), entry point."""
        package = package or f"attn_{name}"
        dist = dist or package.replace("_", "-")
        top = self.folder / package
        top.mkdir()
        (top / "__init__.py").write_text("")
        if manifest is not None:
            (top / f"{name}.toml").write_text(manifest.replace("{name}", name))
        if code is not None:
            (top / "backend.py").write_text(code.replace("{name}", name))
        info = self.folder / f"{dist.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2.3\n{needs}")
        points = f"[attn.backends]\n{name} = {entry or f'{package}.backend:Backend'}\n"
        points += f"[attn.hooks]\n{hooks}\n" if hooks else ""
        (info / "entry_points.txt").write_text(points)
        (info / "RECORD").write_text(f"{package}/__init__.py,,\n{info.name}/METADATA,,\n")
        return top

    def attn(self, *args: str, timeout: float = 60, **env: str) -> Result:
        """Run ``attn`` with these arguments in a process of its own."""
        return self.python("-m", "attn_core", *args, timeout=timeout, **env)

    def python(self, *args: str, timeout: float = 60, **env: str) -> Result:
        """Run the interpreter with the site on its path."""
        done = subprocess.run(
            [sys.executable, *args],
            env=self._environment({**self.env, **env}),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith("ATTN_")}
        # The plugins of this workspace may be installed too; a test is about its own.
        others = {ref.dist for ref in (*INSTALLED.backends, *INSTALLED.problems)} - {"attn-core"}
        left_out = {"ATTN_DISABLE": ",".join((*others, extra.pop("ATTN_DISABLE", "")))}
        return {
            **ours,
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "ATTN_NUM_THREADS": "1",
            **left_out,
            **extra,
        }


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty folder to install plugins in."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)
