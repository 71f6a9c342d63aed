"""The conformance kit: the fp64 oracle, the cases made from a manifest, the checks, and the faults they must catch.

An author needs three lines, in ``tests/test_conformance.py``:

    from attn_core.testing import conformance

    test_conformance = conformance("my_backend")
"""

from __future__ import annotations

from typing import Any

_HOME = {
    "Case": "cases",
    "Report": "report",
    "conformance": "plugin",
    "verify": "runner",
}

__all__ = ["Case", "Report", "conformance", "verify"]


def __getattr__(name: str) -> Any:
    """The public names, each loaded when it is first used: reading evidence must not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
