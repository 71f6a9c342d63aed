"""An engine in another release than was tested, or none at all: one line, and nothing is registered."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from attn_core.engines import sglang, versions
from attn_core.engines.versions import SGLANG, TRANSFORMERS, VLLM, EngineReleases
from attn_core.errors import ProtocolError


@pytest.mark.parametrize(
    ("engine", "version", "line"),
    [
        (TRANSFORMERS, "5.30.1", "not registered with transformers 5.30.1: the adapter was tested with 5.23.* only"),
        (VLLM, "0.33.0", "not registered with vLLM 0.33.0: the adapter was tested with 0.32.* only"),
        (SGLANG, "0.5.230", "not registered with SGLang 0.5.230: the adapter was tested with 0.5.23.* only"),
        (SGLANG, None, "SGLang is not installed; the adapter was tested with 0.5.23.*"),
    ],
)
def test_another_release_is_refused_in_one_line(
    engine: EngineReleases, version: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions.EngineReleases, "installed", lambda self: version)
    assert engine.refusal() == f"attn: {line}"
    with pytest.raises(ProtocolError, match="tested with"):
        engine.require()


@pytest.mark.parametrize(("engine", "version"), [(TRANSFORMERS, "5.23.0"), (VLLM, "0.32.1"), (SGLANG, "0.5.23")])
def test_a_tested_release_is_not(engine: EngineReleases, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.EngineReleases, "installed", lambda self: version)
    assert engine.refusal() is None
    engine.require()


def test_sglangs_entry_point_only_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(versions.EngineReleases, "installed", lambda self: "0.6.0")
    with caplog.at_level(logging.WARNING, logger="sglang.attn"):
        sglang.register()
    assert [record.message for record in caplog.records] == [SGLANG.refusal()]
    assert not [name for name in sys.modules if name.startswith("sglang.")]


def test_no_engine_is_imported_unasked() -> None:
    code = (
        "import sys, attn_core.engines.sglang, attn_core.engines.vllm, attn_core.engines.transformers;"
        "print([n for n in ('torch', 'transformers', 'vllm', 'sglang') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
