"""A site-packages folder to install made-up distributions in, wheels and worse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attn_core.planning.discovery import Installed, discover

TEXT = """
schema = 1
name = "{name}"
protocol = ">=1.0,<2"
summary = "made for a test"
[[supports]]
phases = ["prefill", "decode"]
device = "cuda"
kind = "mha"
dtypes = ["bfloat16"]
head_dims = "any"
page_sizes = [16]
kv_layouts = ["NHD"]
"""
#: A package that must never be imported.
MINE = "raise SystemExit('the plugin was imported')"


@dataclass
class Site:
    """A site-packages folder to install made-up distributions in."""

    folder: Path

    def info(self, dist: str, entry_points: str = "", version: str = "1.2.3", record: str = "") -> Path:
        folder = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (folder / "RECORD").write_text(record)
        if entry_points:
            (folder / "entry_points.txt").write_text(entry_points)
        return folder

    def package(self, package: str, *names: str, at: Path | None = None) -> Path:
        folder = (at or self.folder) / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(MINE)
        (folder / "backend.py").write_text(MINE)
        for name in names:
            (folder / f"{name}.toml").write_text(TEXT.format(name=name))
        return folder

    def wheel(self, name: str, dist: str | None = None, package: str | None = None) -> Path:
        package = package or f"attn_{name}"
        self.info(dist or f"attn-{name}", f"[attn.backends]\n{name} = {package}.backend:Backend\n")
        return self.package(package, name)

    def discover(self, *more: Path, **environ: str) -> Installed:
        return discover([str(self.folder), *map(str, more)], environ)


def only_problem(found: Installed) -> str:
    assert found.backends == ()
    (problem,) = found.problems
    return str(problem) + str(problem.hint)
