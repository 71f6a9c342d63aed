"""Makes the working tree's distributions discoverable on a machine that cannot build wheels: metadata without code."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = ("core", "plugins/attn-fa3", "plugins/attn-flashinfer", "plugins/attn-mla")


def write_site(target: Path) -> None:
    """``<name>-<version>.dist-info`` with METADATA and entry_points.txt for each distribution, under ``target``.

    The code comes from the working tree, through PYTHONPATH (`source_path`).
    """
    for folder in DISTRIBUTIONS:
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = []
        for group, entries in project.get("entry-points", {}).items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""]
        scripts = project.get("scripts", {})
        if scripts:
            lines += ["[console_scripts]", *(f"{name} = {value}" for name, value in scripts.items()), ""]
        (info / "entry_points.txt").write_text("\n".join(lines))


def source_path() -> str:
    """What PYTHONPATH needs."""
    return ":".join(str(ROOT / folder / "src") for folder in DISTRIBUTIONS)
