"""Plugin code in a process of its own, with a time limit: what `attn doctor` learns from it, whatever it does.

This module is also the child: ``python -m attn_core.cli.isolated REPORT TASK [ARGUMENT]`` writes what TASK gave to the
file REPORT as JSON.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_LAST_LINES: Final = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the child: ``report`` if it came to its end, else ``problem``; ``printed`` is what it wrote.

    seconds: from the start of the child to its end, the start of the interpreter among them.
    """

    report: dict[str, Any] | None
    problem: str | None
    printed: str
    seconds: float


def run_isolated(task: str, argument: str = "", *, timeout: float) -> Outcome:
    """Run ``task`` (a name in TASKS) in a fresh interpreter for at most ``timeout`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.json")
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "attn_core.cli.isolated", report, task, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Its whole session: what a plugin starts on import must not outlive the check.
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            return Outcome(None, f"did not come back within {timeout:g} s", printed, time.monotonic() - start)
        seconds = time.monotonic() - start
        try:
            with open(report, encoding="utf-8") as stream:
                return Outcome(json.load(stream), None, printed, seconds)
        except (OSError, ValueError):
            return Outcome(None, _death(process.returncode, printed), printed, seconds)


def _death(code: int, printed: str) -> str:
    last = " / ".join(printed.strip().splitlines()[-_LAST_LINES:])
    if code < 0:
        return f"crashed the interpreter with {signal.Signals(-code).name}"
    return f"ended the interpreter with exit code {code}" + (f": {last}" if last else "")


def _load_backend(object_: str) -> dict[str, Any]:
    """Import ``module:Class`` and look at the class. torch is loaded first, so that its time is not the plugin's."""
    import importlib

    from attn_core.runtime.backend import AttentionBackend

    start = time.monotonic()
    module, _, attribute = object_.partition(":")
    target: Any = importlib.import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part)
    seconds = time.monotonic() - start
    is_backend = isinstance(target, type) and issubclass(target, AttentionBackend)
    return {
        "seconds": seconds,
        "is_backend": is_backend,
        "abstract": sorted(getattr(target, "__abstractmethods__", ())) if is_backend else [],
        "file": getattr(module and sys.modules[module], "__file__", None),
    }


def _describe_torch(_: str) -> dict[str, Any]:
    import torch

    # a vendor's extension adds its own beside torch.cuda
    libraries = [library for name in ("cuda", "npu", "xpu") if (library := getattr(torch, name, None)) is not None]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [
            library.get_device_name(i)
            for library in libraries
            if library.is_available()
            for i in range(library.device_count())
        ],
        "threads": torch.get_num_threads(),
    }


def _hook_checks(_: str) -> dict[str, Any]:
    import warnings

    from attn_core.planning.hooks import load_hooks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every one of them is among hooks.problems as well
        hooks = load_hooks()
        checks = hooks.doctor_checks()
    return {
        "problems": hooks.problems,
        "checks": [{"name": c.name, "status": c.status, "detail": c.detail, "hint": c.hint} for c in checks],
    }


TASKS: Final[dict[str, Callable[[str], dict[str, Any]]]] = {
    "backend": _load_backend,
    "torch": _describe_torch,
    "hooks": _hook_checks,
}


def _extension(chain: list[BaseException]) -> str | None:
    """The extension with which ``import torch`` fails: torch loads each entry point of the group torch.backends."""
    found = (re.search(r"Failed to load the backend extension: ([\w.-]+\w)", str(error)) for error in chain)
    return next((match[1] for match in found if match is not None), None)


def _child(report: str, task: str, argument: str) -> None:
    try:
        found = TASKS[task](argument)
    except SystemExit as error:
        found = {"error": "SystemExit", "message": f"called sys.exit({error.code!r})"}
    except BaseException as error:
        chain = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        found = {"error": type(chain[-1]).__name__, "message": str(chain[-1]), "extension": _extension(chain)}
    with open(report, "w", encoding="utf-8") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    _child(*sys.argv[1:4])
