"""The completion scripts: they parse, and bash's offers what it should. Other shells are asked where they are here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from attn_core.cli import COMMANDS

from .conftest import Site


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script of each shell, in a file."""
    site = Site(tmp_path_factory.mktemp("completion"))
    found = {}
    for shell in ("bash", "zsh", "fish"):
        done = site.attn("completion", shell)
        assert done.code == 0, done.err
        found[shell] = site.folder / f"attn.{shell}"
        found[shell].write_text(done.out)
    return found


def offered(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word, with a stand-in for the command it asks for names."""
    program = f"""
        attn() {{ [ "$*" = "list-backends --names" ] && printf '%s\\n' torch_native triton; }}
        source {script}
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _attn; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_commands(scripts: dict[str, Path]) -> None:
    assert offered(scripts["bash"], "attn", "") == {*COMMANDS, "--help", "--version"}
    assert offered(scripts["bash"], "attn", "list") == {"list-backends"}


@pytest.mark.parametrize("command", ["info", "verify", "warmup"])
def test_backend_names_come_from_the_machine(scripts: dict[str, Path], command: str) -> None:
    assert offered(scripts["bash"], "attn", command, "t") == {"torch_native", "triton"}


def test_presets_and_options(scripts: dict[str, Path]) -> None:
    assert offered(scripts["bash"], "attn", "explain", "gemma-2") == {"gemma-2-9b"}
    assert offered(scripts["bash"], "attn", "explain", "--pa") == {"--page-size"}


def test_values_of_options(scripts: dict[str, Path]) -> None:
    assert offered(scripts["bash"], "attn", "verify", "x", "--tier", "") == {"contract", "numerics", "stress"}
    assert offered(scripts["bash"], "attn", "explain", "x", "--attention-backend", "tri") == {"triton"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_the_shell_parses_it(scripts: dict[str, Path], shell: str) -> None:
    text = scripts[shell].read_text()
    assert all(name in text for name in COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(scripts[shell])], check=True)


def test_an_unknown_shell_is_a_usage_error(site: Site) -> None:
    done = site.attn("completion", "tcsh")
    assert done.code == 2
    assert "bash" in done.err
