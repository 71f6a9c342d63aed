"""Planning is tested in an environment of its own: no variables of ours, no hooks and no measured times from here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attn_core.planning import hooks, plan

from .sites import Site


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("ATTN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "load_hooks", lambda: hooks.load_hooks(path=[]))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return Site(folder)
