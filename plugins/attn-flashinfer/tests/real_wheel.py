"""The real library's wheel, read without installing it or its dependencies: its sources, and the signatures in them."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

WHEELS = Path(__file__).parents[3] / ".cache" / "wheels"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def wheel(requirement: str) -> Path:
    """The wheel of ``name==version``, downloaded once for all runs."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = next(WHEELS.glob(pattern), None)
    if found is None:
        WHEELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WHEELS) as folder:
            platforms = [option for platform in _PLATFORMS for option in ("--platform", platform)]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run(
                [*pip, "--python-version", "3.11", "--implementation", "cp", *platforms, "-d", folder, requirement],
                check=True,
            )
            (downloaded,) = Path(folder).glob(pattern)
            found = WHEELS / downloaded.name
            os.replace(downloaded, found)
    return found


@cache
def source(requirement: str, member: str) -> str:
    """One text file of the wheel."""
    with zipfile.ZipFile(wheel(requirement)) as archive:
        return archive.read(member).decode()


def signature_of(text: str, qualified_name: str) -> inspect.Signature:
    """Of a function, or ``Class.method`` without self, by the source alone; of several definitions the last, which is
    the one that is not an overload."""
    body: list[ast.stmt] = ast.parse(text).body
    *outer, name = qualified_name.split(".")
    for part in outer:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == part).body
    function = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name][-1]
    found = _parameters(function.args)
    return inspect.Signature(found[1:] if outer and found[0].name == "self" else found)


def _parameters(arguments: ast.arguments) -> list[inspect.Parameter]:
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    found = [
        kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < required else None)
        for i, a in enumerate(positional)
    ]
    if arguments.vararg is not None:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg is not None:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return found


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(wheel(wanted).name)
