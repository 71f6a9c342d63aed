"""Where the package of a distribution lies on disk, wheel or editable, found without importing it."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator

from attn_core.planning.distributions import Distribution


def package_folder(distribution: Distribution, package: str) -> str | None:
    """The folder of the top-level ``package``, None if there is none.

    Looks beside the metadata (a wheel), where the distribution's own .pth files and editable finders point (an
    editable install), on sys.path, and at last asks the finders that are installed; none of this imports the package.
    """
    for parent in _parents(distribution, package):
        folder = os.path.join(parent, package)
        if os.path.isdir(folder):
            return folder
    return None


def module_exists(folder: str, module: str) -> bool:
    """Whether ``module`` (dotted, its first part being the package in ``folder``) has a file there."""
    path = os.path.join(folder, *module.split(".")[1:])
    if os.path.isdir(path) or os.path.isfile(path + ".py"):
        return True
    parent, name = os.path.split(path)
    try:
        return any(
            entry.startswith(name + ".") and entry.endswith((".so", ".pyd", ".pyc")) for entry in os.listdir(parent)
        )
    except OSError:
        return False


def _parents(distribution: Distribution, package: str) -> Iterator[str]:
    beside = os.path.dirname(distribution.folder)
    if os.path.isfile(os.path.join(beside, package, "__init__.py")):
        yield beside
    for file in _recorded(distribution):
        if file.endswith(".pth"):
            yield from _pth_lines(os.path.join(beside, file))
        elif file.startswith("__editable__") and file.endswith("_finder.py"):
            yield from _mapped(os.path.join(beside, file), package)
    yield beside  # without an __init__.py: a namespace package, or a folder of manifests
    yield from sys.path
    yield from _found_by_finders(package)


def _recorded(distribution: Distribution) -> list[str]:
    """The files of the distribution that lie at the top of site-packages: among them what makes it editable."""
    lines = (distribution.read("RECORD") or "").splitlines()
    return [file for file in (line.partition(",")[0] for line in lines) if "/" not in file]


def _pth_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            lines = [line.strip() for line in stream]
    except OSError:
        return []
    return [line for line in lines if line and not line.startswith(("#", "import ", "import\t"))]


def _mapped(path: str, package: str) -> Iterator[str]:
    """Editable finders of setuptools keep ``MAPPING = {package: folder}``; it is read, not run."""
    try:
        with open(path, encoding="utf-8") as stream:
            tree = ast.parse(stream.read())
    except (OSError, SyntaxError, ValueError):
        return
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == "MAPPING" for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            try:
                mapping = ast.literal_eval(node.value) if node.value is not None else {}
            except ValueError:
                continue
            if isinstance(mapping, dict) and isinstance(mapping.get(package), str):
                yield os.path.dirname(mapping[package])


def _found_by_finders(package: str) -> Iterator[str]:
    from importlib.util import find_spec

    try:
        spec = find_spec(package)  # a top-level name: nothing is executed
    except (ImportError, ValueError, AttributeError):
        return
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        yield os.path.dirname(folder)
