"""The wheels of every distribution of the workspace, and empty environments to install them in."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def distributions() -> list[Path]:
    """The folder of each distribution: core first, then the plugins."""
    return [ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/attn-*/pyproject.toml"))]


def run(*command: str | Path, cwd: Path | None = None, timeout: float = 600, **env: str) -> str:
    """Run a command and give its stdout; a failure shows both streams."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("ATTN_", "PYTHONPATH"))}
    one_thread = {"OMP_NUM_THREADS": "1", "ATTN_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ours, **one_thread, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheels(folders: Sequence[Path], output: Path) -> list[Path]:
    """Build a wheel from each folder into ``output``, with the build backend that is installed."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", output, *folders)
    return sorted(output.glob("*.whl"))


@dataclass(frozen=True)
class Environment:
    """A virtual environment in which nothing of ours is installed but the wheels it was given."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @classmethod
    def make(cls, folder: Path) -> Environment:
        """An environment that sees what the wheels depend on, torch above all, by links to what is installed here."""
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        here = Path(sysconfig.get_paths()["purelib"])
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for entry in here.iterdir():
            if not entry.name.lower().startswith(("attn", "_attn", "__editable__")) and entry.suffix != ".pth":
                (borrowed / entry.name).symlink_to(entry)
        environment = cls(folder)
        (environment.site / "borrowed.pth").write_text(f"{borrowed}\n")
        return environment

    @property
    def site(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def install(self, *wheels: Path) -> None:
        """Install these wheels, from nowhere else."""
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python)
        run(*pip, "install", "--quiet", "--no-deps", "--no-index", *wheels)

    def attn(self, *arguments: str | Path, timeout: float = 600, **env: str) -> str:
        """Run the environment's ``attn`` outside the workspace and give its stdout."""
        return run(self.folder / "bin" / "attn", *arguments, cwd=self.folder, timeout=timeout, **env)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wheel of every distribution."""
    return build_wheels(distributions(), tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def core_wheel(wheels: list[Path]) -> Path:
    """The core's."""
    return next(wheel for wheel in wheels if wheel.name.startswith("attn_core-"))
