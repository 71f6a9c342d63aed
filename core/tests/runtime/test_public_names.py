"""The public names of attn_core: which there are, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import attn_core
import pytest


def test_the_public_names_are_these() -> None:
    assert attn_core.__all__ == [
        "AttentionBackend", "AttentionConfig", "AttentionLayer", "AttnError", "BackendRef", "Decision", "FallbackEvent",
        "ForwardBatch", "ForwardMode", "GraphRunner", "GraphShape", "KVCache", "LayerKind", "Manifest", "PageAllocator",
        "Phase", "PhaseRouter", "Plan", "Reason", "System", "TreeMask", "Witness", "build", "discover", "evaluate",
        "hookimpl", "merge_state", "plan", "register", "settle", "unregister",
    ]  # fmt: skip


def test_each_loads_when_it_is_used() -> None:
    for name in attn_core.__all__:
        assert getattr(attn_core, name) is not None
        assert name in dir(attn_core)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attn_core.nothing  # noqa: B018


@pytest.mark.parametrize(
    "use", ["pass", "attn_core.plan", "attn_core.AttentionConfig", "attn_core.register", "attn_core.System"]
)
def test_what_plans_imports_no_torch(use: str) -> None:
    code = f"import attn_core, sys; {use}; assert not {{'torch', 'numpy', 'pluggy'}} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
