"""The command itself: what it imports, how it fails, what it says where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attn_core import cli, errors
from attn_core.cli import group

from .conftest import Site

#: The command as a process of its own.
ATTN = [sys.executable, "-m", "attn_core"]


def test_python_m_is_the_command(site: Site) -> None:
    done = site.attn("--version")
    assert done.code == 0
    assert done.out.split()[0] == "attn"
    assert done.out.split()[1][0].isdigit()


def test_help_lists_every_command_and_imports_none(site: Site) -> None:
    script = (
        "import sys; from attn_core.cli import main; main(['--help']);"
        "ours = {m for m in sys.modules if m.startswith('attn_core.cli.')};"
        "print(sorted(ours - {'attn_core.cli.group'}), file=sys.stderr)"
    )
    done = site.python("-c", script)
    assert all(name in done.out for name in cli.COMMANDS)
    assert done.err.strip() == "[]"


def test_every_listed_command_is_there() -> None:
    import click

    for name in cli.COMMANDS:
        assert group.attn.get_command(click.Context(group.attn), name) is not None, name


def test_no_arguments_shows_the_help(site: Site) -> None:
    done = site.attn()
    assert done.code == 0
    assert "list-backends" in done.out


@pytest.mark.parametrize("command", [[], ["list-backends"], ["explain"]])
def test_help_may_be_asked_for_in_short(site: Site, command: list[str]) -> None:
    short, long = site.attn(*command, "-h"), site.attn(*command, "--help")
    assert (short.code, short.out) == (0, long.out)
    assert "Usage: attn" in short.out


def test_an_unknown_command_suggests_the_nearest(site: Site) -> None:
    done = site.attn("list-backend")
    assert done.code == 2
    assert "list-backends" in done.err
    assert done.out == ""


def test_an_unknown_option_is_a_usage_error(site: Site) -> None:
    done = site.attn("list-backends", "--jsn")
    assert done.code == 2
    assert "--json" in done.err


@pytest.mark.parametrize(
    "error",
    [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.AttnError)],
    ids=lambda each: each.__name__,
)
def test_an_error_of_ours_is_a_message_and_its_exit_code(
    error: type[errors.AttnError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise error("what was given", accepted="what is accepted", hint="what to do")

    monkeypatch.setattr(group, "run", fail)
    assert cli.main(["info"]) == error.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"attn: what was given [{error.code}]",
        "accepted: what is accepted",
        "next: what to do",
    ]


def test_a_bug_is_one_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(group, "run", lambda _: 1 // 0)
    monkeypatch.delenv("ATTN_DEBUG", raising=False)
    assert cli.main(["info"]) == cli.UNEXPECTED
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    assert "ATTN_DEBUG=1" in err


def test_a_bug_shows_where_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "run", lambda _: 1 // 0)
    monkeypatch.setenv("ATTN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_an_interrupt_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(group, "run", interrupt)
    assert cli.main(["info"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


COMMANDS = {
    "without click": ["list-backends", "--json"],
    "by click": ["explain", "llama-3.1-8b"],
    "a short one": ["list-backends", "--names"],
}


@pytest.mark.parametrize("args", COMMANDS.values(), ids=COMMANDS)
def test_a_closed_pipe_is_no_error_and_no_failed_check(site: Site, args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*ATTN, *args], stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == cli.PIPE_CLOSED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("args", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_is_said_in_one_line(site: Site, args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ATTN, *args], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == cli.IO_FAILED
    assert done.stderr.splitlines()[0] == "attn: No space left on device"
    assert "bug" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed_is_no_bug(site: Site, closed: int) -> None:
    script = (
        f"import os, sys; os.close({closed}); os.execv({sys.executable!r}, {[*ATTN, 'list-backends', '--names']!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    if closed == 2:
        assert done.returncode == 0
        assert "torch_native" in done.stdout
    else:
        assert (done.returncode, done.stderr) == (cli.IO_FAILED, "attn: stdout is closed\n")


def test_a_file_that_cannot_be_written_is_named(site: Site) -> None:
    case = "decode/8x2x64/1@31/dtype=float32"
    done = site.attn("verify", "torch_native", "--device", "cpu", "--case", case, "--junit", "no/x.xml")
    assert done.code == cli.IO_FAILED
    assert "attn: No such file or directory: no/x.xml" in done.err
    assert "bug" not in done.err


def test_a_new_package_goes_where_it_can(site: Site) -> None:
    (site.folder / "file").write_text("")
    done = site.attn("new", "fresh", "--output", "file/inside")
    assert done.code == 2
    assert "file/inside cannot be made: Not a directory" in done.err


def test_every_json_document_has_the_envelope(site: Site) -> None:
    site.plugin("good")
    for args in (["list-backends", "--json"], ["info", "good", "--json"], ["matrix", "--format", "json"]):
        document = site.attn(*args).json
        assert document["schema"] == f"attn/{args[0]}"
        assert document["version"] == 1


def test_our_warnings_are_one_line_of_prose(site: Site) -> None:
    script = (
        "import warnings; from attn_core.cli import group; from attn_core.planning.plan import FallbackWarning;"
        "group.run(['--version']); warnings.warn('prefill runs on b', FallbackWarning)"
    )
    assert site.python("-c", script).err == "attn: prefill runs on b\n"


def test_the_interpreter_and_the_script_agree(site: Site) -> None:
    script = Path(sys.executable).parent / "attn"
    by_script = subprocess.run([script, "list-backends", "--json"], capture_output=True, text=True, check=True)
    by_module = subprocess.run(
        [sys.executable, "-m", "attn_core", "list-backends", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(by_script.stdout) == json.loads(by_module.stdout)
