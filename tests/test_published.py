"""What a package index shows of each distribution, and what an install brings: licences, metadata, requirements."""

from __future__ import annotations

import json
import re
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from attn_core.planning.manifest import Manifest
from attn_core.planning.versions import Requirement, Version
from packaging.requirements import Requirement as Dependency

from .conftest import ROOT, distributions, run

pytestmark = pytest.mark.xdist_group("wheels")

CLASSIFIERS = {
    "Development Status :: 4 - Beta",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
}
#: What belongs to the machine and not to a package: torch-npu comes in the version of the machine's CANN.
OF_THE_MACHINE = {"torch-npu"}
#: What a kernel library stands on, and is no library of kernels itself.
GROUND = {"attn-core", "torch", "triton"}


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def dependencies(folder: Path) -> dict[str, Dependency]:
    """By name, those of extras among them."""
    extras = project(folder).get("optional-dependencies", {}).values()
    texts = [*project(folder)["dependencies"], *(text for extra in extras for text in extra)]
    return {each.name: each for each in map(Dependency, texts)}


def files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path) -> Message:
    (name,) = (name for name in files(wheel) if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())


def test_every_wheel_carries_the_licence_and_is_typed(wheels: list[Path]) -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    for wheel in wheels:
        (name,) = (name for name in files(wheel) if name.endswith(".dist-info/licenses/LICENSE"))
        assert zipfile.ZipFile(wheel).read(name) == licence
        package = wheel.name.split("-")[0]
        assert f"{package}/py.typed" in files(wheel), wheel.name


def test_every_wheel_has_one_package_and_all_that_its_source_has(wheels: list[Path]) -> None:
    for wheel in wheels:
        package = wheel.name.split("-")[0]
        inside = {name for name in files(wheel) if not name.startswith(f"{package}-")}
        assert {name.split("/")[0] for name in inside} == {package}, wheel.name
        (source,) = ROOT.glob(f"*/src/{package}") if package == "attn_core" else ROOT.glob(f"plugins/*/src/{package}")
        written = {
            f"{package}/{path.relative_to(source).as_posix()}"
            for path in source.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert {name for name in inside if not name.startswith("attn_core/evidence/")} == written


@pytest.mark.parametrize("name", ["core", "attn-wave"])
def test_a_source_distribution_gives_the_same_wheel(name: str, wheels: list[Path], tmp_path: Path) -> None:
    """Of the two that carry what is not Python of their own: evidence and templates, and compiled kernels."""
    (folder,) = (folder for folder in distributions() if folder.name == name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, folder)  # the wheel out of the sdist
    (rebuilt,) = tmp_path.glob("*.whl")
    (wheel,) = (wheel for wheel in wheels if wheel.name == rebuilt.name)
    contents = [{name: zipfile.ZipFile(each).read(name) for name in files(each)} for each in (rebuilt, wheel)]
    assert contents[0] == contents[1]


def test_the_metadata_is_whole(wheels: list[Path]) -> None:
    for wheel in wheels:
        shown = metadata(wheel)
        assert shown["Requires-Python"] == ">=3.11"
        assert shown["License-Expression"] == "Apache-2.0"
        assert shown["Summary"]
        assert set(shown.get_all("Classifier", [])) >= CLASSIFIERS, wheel.name
        assert shown["Description-Content-Type"] == "text/markdown"
        assert re.search(rf"^    pip install .*\b{shown['Name']}\b", str(shown.get_payload()), re.MULTILINE), wheel.name


@pytest.mark.parametrize("folder", distributions(), ids=lambda folder: folder.name)
def test_a_readme_links_to_nothing_that_an_index_does_not_have(folder: Path) -> None:
    """It is the page of the distribution on an index, where a path into the repository leads nowhere."""
    links = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text())
    assert [link for link in links if link.startswith("..")] == []


def test_all_plugins_take_the_same_cores() -> None:
    accepted = {folder.name: str(dependencies(folder)["attn-core"].specifier) for folder in distributions()[1:]}
    assert set(accepted.values()) == {"<0.2,>=0.1"}, accepted
    assert all(project(folder)["version"].startswith("0.1.") for folder in distributions())


@pytest.mark.parametrize("folder", distributions()[1:], ids=lambda folder: folder.name)
def test_what_planning_asks_for_is_what_an_install_brings(folder: Path) -> None:
    """Of the alternatives of a manifest one is a dependency, within the manifest's bounds and ending where they end."""
    for name, target in project(folder)["entry-points"]["attn.backends"].items():
        package = folder / "src" / target.split(".")[0].split(":")[0]
        for requirement in Manifest.parse((package / f"{name}.toml").read_text()).requires_dists:
            names = {choice for choice, _ in requirement.choices}
            brought = [each for each in dependencies(folder).values() if each.name in names]
            assert brought or names <= OF_THE_MACHINE, f"{name} asks for {requirement}, which no install brings"
            for each in brought:
                assert_within(each, requirement)


@pytest.mark.parametrize("folder", distributions()[1:], ids=lambda folder: folder.name)
def test_an_install_may_bring_the_versions_that_were_proved_on_silicon(folder: Path) -> None:
    """And the page of the distribution names that version of its library."""
    brought, page = dependencies(folder), (folder / "README.md").read_text()
    for name in project(folder)["entry-points"]["attn.backends"]:
        for path in ROOT.glob(f"evidence/*/{name}.json"):
            run = json.loads(path.read_text())
            if run["level"] != "silicon":
                continue
            proved = {dist: version for dist, version in run["versions"].items() if dist in brought}
            assert set(proved) > {"attn-core"}, f"{path.name} does not say of which library it is"
            for dist, version in proved.items():
                assert brought[dist].specifier.contains(version, prereleases=True), f"{dist} {version} was proved"
                assert dist in GROUND or version in page, f"{dist} {version} was proved, its README is silent"


def test_torch_finds_its_numpy() -> None:
    """Where numpy is missing, torch begins with a warning, and so does the first command of everyone."""
    assert {"torch", "numpy"} <= set(dependencies(ROOT / "core"))


def assert_within(dependency: Dependency, requirement: Requirement) -> None:
    """The least version that an installer may take, and what it must stay below, are the manifest's own or tighter."""
    accepted = dict(requirement.choices)[dependency.name]
    bounds = {each.operator: each.version for each in dependency.specifier}
    least = bounds.get(">=") or bounds["=="]
    assert accepted.allows(least), f"{dependency} may bring {least}, the manifest says {requirement}"
    ends = [version for operator, version in accepted.bounds if operator == "<"]
    if ends and "==" not in bounds:
        assert Version.parse(bounds["<"]) <= Version.parse(ends[0]), f"{dependency} against {requirement}"


def test_every_extra_that_a_text_names_exists() -> None:
    """Hints of errors and documents: `pip install 'attn-core[demo]'`."""
    extras = {
        project(folder)["name"]: set(project(folder).get("optional-dependencies", ())) for folder in distributions()
    }
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*.md"), ROOT / "core/README.md"]
    texts += [path for folder in distributions() for path in (folder / "src").rglob("*.py")]
    for path in texts:
        for name, named in re.findall(r"\b(attn-[a-z0-9]+)\[([a-z0-9,]+)\]", path.read_text()):
            missing = set(named.split(",")) - extras[name]
            assert not missing, f"{path.relative_to(ROOT)} names {name}[{named}]"
