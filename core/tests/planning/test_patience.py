"""Whoever waits for a plugin is told for what, and only then."""

from __future__ import annotations

import threading

import pytest
from attn_core.planning import patience
from attn_core.planning.patience import SlowPluginWarning, not_in_silence


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type[Warning], str]]:
    """What was warned of."""
    heard: list[tuple[type[Warning], str]] = []
    monkeypatch.setattr(patience.warnings, "warn", lambda text, category, **_: heard.append((category, text)))
    return heard


def test_what_takes_long_is_said_while_it_does(
    told: list[tuple[type[Warning], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = threading.Event()
    original = patience._say

    def say(*args: str) -> None:
        original(*args)
        said.set()

    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "_say", say)
    with not_in_silence("backend 'mine'", "importing it", "attn-mine"):
        assert said.wait(60)
    ((category, text),) = told
    assert category is SlowPluginWarning
    assert text.startswith("backend 'mine': importing it has taken 0.01 s so far; Ctrl-C ends it")
    assert "ATTN_DISABLE=attn-mine" in text


def test_what_comes_back_in_time_is_not_spoken_of(told: list[tuple[type[Warning], str]]) -> None:
    before = threading.active_count()
    with not_in_silence("backend 'mine'", "importing it", "attn-mine"):
        waiting = threading.enumerate()[-1]
    waiting.join(60)
    assert threading.active_count() == before
    assert told == []
