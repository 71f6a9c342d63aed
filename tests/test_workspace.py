"""Rules that hold over all distributions: who may name whom, and what the packages say of themselves."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attn_core.planning.manifest import Manifest

from .conftest import ROOT, distributions

PLUGINS = distributions()[1:]


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def backends(folder: Path) -> dict[str, str]:
    entries: dict[str, str] = project(folder).get("entry-points", {}).get("attn.backends", {})
    return entries


def requirements(folder: Path) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", text)[0].lower() for text in project(folder)["dependencies"]}


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_a_plugin_is_named_after_its_folder_and_stands_on_the_core_alone(folder: Path) -> None:
    assert project(folder)["name"] == folder.name
    assert "attn-core" in requirements(folder)
    assert not requirements(folder) & {other.name for other in PLUGINS}
    assert project(folder)["license"] == "Apache-2.0"
    assert project(folder)["requires-python"] == ">=3.11"


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_every_backend_has_its_manifest_and_the_other_way_round(folder: Path) -> None:
    assert backends(folder)
    for name, target in backends(folder).items():
        package = folder / "src" / target.split(".")[0].split(":")[0]
        assert Manifest.parse((package / f"{name}.toml").read_text()).name == name


def test_names_are_unique_over_the_workspace() -> None:
    names = [name for folder in distributions() for name in backends(folder)]
    assert len(names) == len(set(names))


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module but its docstrings, and the pieces of f-strings, which are no names."""
    tree = ast.parse(path.read_text())
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = pieces | {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


#: Words of a vendor for its chips, by which machines are named, and which happen to be a backend's name as well.
CHIP_FAMILIES = {("planning/system.py", "ascend")}


def test_no_file_of_the_core_names_a_backend_of_a_plugin() -> None:
    """The preference table is data, so it is not among these; torch_native is the core's own."""
    names = {name for folder in PLUGINS for name in backends(folder)}
    core = ROOT / "core" / "src" / "attn_core"
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in sorted(core.rglob("*.py"))
        for line, text in texts(path)
        if text in names and (path.relative_to(core).as_posix(), text) not in CHIP_FAMILIES
    ]
    assert found == []


def test_a_file_opens_with_one_sentence_and_stays_a_room() -> None:
    """Of the code that ships: what lives here, in at most about 400 lines."""
    for folder in distributions():
        for path in sorted((folder / "src").rglob("*.py")):
            text = path.read_text()
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} does not say what lives there"
            assert len(text.splitlines()) <= 420, f"{path.relative_to(ROOT)} is too long for one room"
