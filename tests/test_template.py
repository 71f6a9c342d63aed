"""What `attn new` writes: it builds, installs beside the core's wheel, lists, verifies, and generates text."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from attn_core.cli.new import render
from attn_core.testing.runner import verify

from .conftest import ROOT, Environment, build_wheels, run

pytestmark = pytest.mark.xdist_group("wheels")

#: the size of a backend that works, and of a conformance test: what a newcomer reads first
MAX_BACKEND_LINES = 80
CONFORMANCE_STATEMENTS = 2


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered package for a backend called `mine`."""
    return render("mine", tmp_path_factory.mktemp("new") / "attn-mine")


@pytest.fixture(scope="module")
def installed(project: Path, core_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the core's wheel and the package's, and nothing else of ours."""
    (wheel,) = build_wheels([project], tmp_path_factory.mktemp("mine-wheel"))
    environment = Environment.make(tmp_path_factory.mktemp("mine") / "venv")
    environment.install(core_wheel, wheel)
    return environment


def test_it_is_small_and_complete(project: Path) -> None:
    files = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    assert files == {
        "pyproject.toml",
        "README.md",
        ".github/workflows/ci.yml",
        "src/attn_mine/__init__.py",
        "src/attn_mine/mine.toml",
        "src/attn_mine/backend.py",
        "tests/test_conformance.py",
    }
    assert len((project / "src/attn_mine/backend.py").read_text().splitlines()) <= MAX_BACKEND_LINES
    conformance = (project / "tests/test_conformance.py").read_text().split('"""')[2]
    assert len([line for line in conformance.splitlines() if line.strip()]) == CONFORMANCE_STATEMENTS
    for name in files:
        assert "{{" not in (project / name).read_text().replace("${{", "")


def test_its_code_is_clean(project: Path) -> None:
    config = ("--config", ROOT / "pyproject.toml")
    run(Path(sys.executable).parent / "ruff", "check", *config, project)
    run(Path(sys.executable).parent / "ruff", "format", "--check", *config, project)
    run(Path(sys.executable).parent / "mypy", "--strict", project / "src/attn_mine")


def test_it_lists_beside_the_core(installed: Environment) -> None:
    document = json.loads(installed.attn("list-backends", "--json", "--strict"))
    assert [each["name"] for each in document["backends"]] == ["mine", "torch_native"]
    assert all(each["usable"] for each in document["backends"])


def test_doctor_loads_it(installed: Environment) -> None:
    checks = {each["name"]: each for each in json.loads(installed.attn("doctor", "--json"))["checks"]}
    assert checks["mine"]["status"] == "ok"


def test_it_passes_the_contract_tier(installed: Environment) -> None:
    installed.attn("verify", "mine", "--tier", "contract")


def test_its_own_test_suite_is_the_kit(project: Path, installed: Environment) -> None:
    # its decodes: the command above ran them all
    written = run(installed.python, "-m", "pytest", "-q", "-x", "-k", "decode", "-p", "no:cacheprovider", cwd=project)
    assert " passed" in written.splitlines()[-1]


def test_it_generates_the_same_text_as_the_default(installed: Environment) -> None:
    def text(backend: str) -> str:
        return installed.attn(
            "generate", "The capital of France is", "--max-new-tokens", "8", "--dtype", "float32",
            "--attention-backend", backend,
        )  # fmt: skip

    assert text("mine") == text("torch_native")


def test_an_overclaim_is_caught(installed: Environment) -> None:
    """The step of the tutorial where the manifest says more than the code does."""
    manifest = Path(json.loads(installed.attn("info", "mine", "--json"))["manifest"])
    assert manifest.is_relative_to(installed.folder)
    modest = manifest.read_text()
    manifest.write_text(modest.replace('"lse"', '"sliding_window", "lse"'))
    try:
        with pytest.raises(AssertionError, match="sliding_window") as caught:
            installed.attn("verify", "mine", "--select", "decode/8x2x64+window")
    finally:
        manifest.write_text(modest)
    assert "false: sliding_window (over-claimed)" in str(caught.value)
    assert "it is right for no window" in str(caught.value)


def test_the_emulator_of_the_tutorial_stands_in(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendered backend, for a card that nobody has."""
    tutorial = (ROOT / "docs/backend-in-15-minutes.md").read_text()
    emulator = tutorial.partition("# src/attn_mine/emulator.py\n")[2].partition("```")[0]
    entry_point = next(line.strip() for line in tutorial.splitlines() if "attn_mine.emulator:" in line)
    package, info = tmp_path / "attn_mine", tmp_path / "attn_mine-0.1.0.dist-info"
    shutil.copytree(project / "src/attn_mine", package)
    (package / "emulator.py").write_text(emulator)
    (package / "mine.toml").write_text((package / "mine.toml").read_text().replace('"any"\nkind', '"npu"\nkind'))
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attn-mine\nVersion: 0.1.0\n")
    backend = "[attn.backends]\nmine = attn_mine.backend:MineBackend\n"
    (info / "entry_points.txt").write_text(f"{backend}[attn.emulators]\n{entry_point.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    report = verify("mine", select="decode/8x2x64/1@31")
    assert report.exit_code == 0
    assert (report.device, report.level) == ("emulated:card9000", "contract-emulated")
    assert report.facts["versions"]["card-operators"] == "2.1"


@pytest.mark.parametrize("name", ["Mine", "my-backend", "1st", "class", "", "mein_ß"])
def test_a_name_that_cannot_be_a_backends_is_refused(name: str, tmp_path: Path) -> None:
    from attn_core.errors import UsageError

    with pytest.raises(UsageError):
        render(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    from attn_core.errors import UsageError

    with pytest.raises(UsageError, match="attn-core"):
        render("torch_native", tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    from attn_core.errors import UsageError

    (tmp_path / "theirs.txt").write_text("theirs")
    with pytest.raises(UsageError, match="--output"):
        render("mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]
