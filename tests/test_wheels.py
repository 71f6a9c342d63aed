"""Every distribution as a user gets it: a wheel that builds, installs into an empty environment, and lists."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path

import pytest

from .conftest import Environment, distributions

pytestmark = pytest.mark.xdist_group("wheels")


@pytest.fixture(scope="module")
def everything(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel of every distribution."""
    environment = Environment.make(tmp_path_factory.mktemp("everything") / "venv")
    environment.install(*wheels)
    return environment


def test_each_distribution_has_a_wheel(wheels: list[Path]) -> None:
    assert {wheel.name.split("-")[0] for wheel in wheels} == {d.name.replace("-", "_") for d in distributions()} - {
        "core"
    } | {"attn_core"}


def test_the_cores_wheel_has_what_is_not_python(core_wheel: Path) -> None:
    names = set(zipfile.ZipFile(core_wheel).namelist())
    assert {"attn_core/py.typed", "attn_core/torch_native.toml", "attn_core/template/copier.yml"} <= names
    assert any(name.startswith("attn_core/template/project/.github/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_the_cores_wheel_carries_the_evidence(core_wheel: Path) -> None:
    root = distributions()[0].parent
    measured = {f"attn_core/{path.relative_to(root)}" for path in root.glob("evidence/*/*.json")}
    carried = {name for name in zipfile.ZipFile(core_wheel).namelist() if name.startswith("attn_core/evidence/")}
    assert carried == measured


def test_all_of_them_list_beside_each_other(everything: Environment) -> None:
    document = json.loads(everything.attn("list-backends", "--json", "--strict"))
    assert document["problems"] == []
    projects = [tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in distributions()]
    declared = {name for each in projects for name in each.get("entry-points", {}).get("attn.backends", {})}
    assert {each["name"] for each in document["backends"]} == declared


def test_nothing_of_it_comes_from_the_workspace(everything: Environment) -> None:
    for name in everything.attn("list-backends", "--names").split():
        manifest = json.loads(everything.attn("info", name, "--json"))["manifest"]
        assert Path(manifest).is_relative_to(everything.folder)


def test_it_plans_and_runs(everything: Environment) -> None:
    assert "prefill" in everything.attn("explain", "llama-3.1-8b")
    assert "deepseek-v3 on cuda:sm_100" in everything.attn("explain", "deepseek-v3", "--system", "cuda:sm_100")
    table = everything.attn("verify", "torch_native", "--select", "decode/", "-n", "2")
    assert " 0 failed" in table
