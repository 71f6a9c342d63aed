"""How far a command is: a line for each thing in a log, a bar that goes away for a person; never on stdout."""

from __future__ import annotations

import io

import pytest
from attn_core.cli.progress import Progress


def test_a_log_gets_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for what, done in (("converting", 0), ("converting", 1), ("loading", 0), ("loading", 2)):
            progress(what, done, 2)
    assert capsys.readouterr() == ("", "attn: converting\nattn: loading\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_person_sees_a_bar_with_counts_and_then_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with Progress() as progress:
        progress("loading weights", 0, 272)
        progress("loading weights", 136, 272)
        progress("reading the prompts", 0, 9)
    assert "loading weights" in screen.getvalue()
    assert "136/272" in screen.getvalue()
    assert "\x1b[2K" in screen.getvalue(), "the line is erased"
    assert capsys.readouterr().out == ""
