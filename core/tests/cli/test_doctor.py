"""`attn doctor`: whatever a plugin does when it is loaded is one finding, and the others are checked all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attn_core.cli import checkup
from attn_core.planning.discovery import Installed
from attn_core.planning.system import System

from .conftest import BACKEND, MANIFEST, Result, Site

#: the run with all of them is made once: it is a dozen processes that import torch
pytestmark = pytest.mark.xdist_group("doctor")

#: what a plugin does on import -> what the finding says
MISBEHAVIOUR = {
    "raises": ("raise RuntimeError('no luck today')", "fail", "RuntimeError: no luck today"),
    "exits": ("import sys; sys.exit(3)", "fail", "called sys.exit(3)"),
    "dies": ("import os; os._exit(7)", "fail", "ended the interpreter with exit code 7"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "fail", "SIGSEGV"),
    "prints": ("print('hello from a plugin')\n" + BACKEND, "warn", "'hello from a plugin'"),
    "slow": ("import time; time.sleep(3.2)\n" + BACKEND, "warn", "s to import"),
    "lacks_module": ("import no_such_module_at_all", "fail", "No module named 'no_such_module_at_all'"),
    "other_torch": (
        "raise ImportError('ext.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')",
        "fail",
        "built against another torch",
    ),
    "no_backend": ("Backend = dict", "fail", "is no AttentionBackend"),
    "unfinished": (
        "from attn_core import AttentionBackend\nclass Backend(AttentionBackend): ...",
        "fail",
        "lacks forward_decode, forward_extend",
    ),
    "good": (BACKEND, "ok", "loads in"),
}

HOOKS = """
from attn_core.planning.hookspecs import hookimpl
from attn_core.planning.hooks import DoctorCheck


@hookimpl
def attn_doctor_checks():
    return [DoctorCheck("the moon", "warn", "is full", "wait")]
"""


def checks(done: Result) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in done.json["checks"]}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, dict[str, Any]]]:
    """One run beside every plugin that misbehaves and ends: each costs a process that imports torch."""
    site = Site(tmp_path_factory.mktemp("doctor"))
    for name, (code, _, _) in MISBEHAVIOUR.items():
        site.plugin(name, code=code)
    site.plugin("future", manifest=MANIFEST.replace(">=1.0,<2", ">=9"), code="raise AssertionError('was loaded')")
    site.plugin("broken", manifest="schema = = 1")
    lacking = MANIFEST.replace("[[supports]]", "[requires]\ndists = ['nothing-such>=2']\n[[supports]]")
    site.plugin("lacking", manifest=lacking, code="import nothing_such")
    site.plugin("skewed", requires=("torch==1.0", "click>=1", "rich>=999; python_version > '3'"))
    site.plugin("hooked", hooks="moon = attn_hooked.moon")
    (site.folder / "attn_hooked" / "moon.py").write_text(HOOKS)
    done = site.attn("doctor", "--json", timeout=300)
    return done, checks(done)


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_what_a_plugin_does_on_import_is_a_finding(name: str, findings: tuple[Result, dict[str, Any]]) -> None:
    _, status, said = MISBEHAVIOUR[name]
    found = findings[1][name]
    assert found["status"] == status
    assert said in found["detail"]
    assert "attn-" + name.replace("_", "-") in found["detail"]


def test_a_failed_check_is_exit_code_1(findings: tuple[Result, dict[str, Any]]) -> None:
    assert findings[0].code == 1


def test_what_plugins_print_does_not_reach_stdout(findings: tuple[Result, dict[str, Any]]) -> None:
    assert findings[0].json["schema"] == "attn/doctor"


def test_the_machine_the_core_and_torch_are_checked(findings: tuple[Result, dict[str, Any]]) -> None:
    assert {findings[1][name]["status"] for name in ("python", "attn-core", "torch", "torch_native")} == {"ok"}
    assert "system" in findings[1]


def test_another_protocol_is_not_even_loaded(findings: tuple[Result, dict[str, Any]]) -> None:
    assert findings[1]["future"]["status"] == "fail"
    assert "not loaded" in findings[1]["future"]["detail"]


def test_what_discovery_found_broken_is_here_too(findings: tuple[Result, dict[str, Any]]) -> None:
    assert "is not TOML" in findings[1]["broken"]["detail"]


def test_a_missing_library_is_a_warning_with_what_to_install(findings: tuple[Result, dict[str, Any]]) -> None:
    assert findings[1]["lacking"]["status"] == "warn"
    assert findings[1]["lacking"]["hint"] == "pip install 'nothing-such>=2'"
    assert "lacking would run here" in findings[1]["to get more"]["detail"]


def test_a_version_skew_is_found_without_loading(findings: tuple[Result, dict[str, Any]]) -> None:
    skew = findings[1]["attn-skewed needs"]
    assert skew["status"] == "fail"
    assert skew["detail"].startswith("torch==1.0, found torch 2")


def test_hooks_add_their_checks(findings: tuple[Result, dict[str, Any]]) -> None:
    assert findings[1]["the moon"] == {"name": "the moon", "status": "warn", "detail": "is full", "hint": "wait"}


def test_a_plugin_that_hangs_is_ended_with_what_it_started(site: Site, tmp_path: Path) -> None:
    mark = tmp_path / "child.pid"
    site.plugin(
        "hangs",
        code="import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)",
    )
    done = site.attn("doctor", "--json", "--timeout", "12", timeout=120)
    found = checks(done)["hangs"]
    assert found["status"] == "fail"
    assert "did not come back within 12 s" in found["detail"]
    assert done.code == 1
    # A process that was killed and not yet waited for by init is a zombie: ended all the same.
    status = Path(f"/proc/{mark.read_text()}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_extension_of_torch_that_does_not_load_is_named_and_nobody_else_is_blamed(site: Site) -> None:
    """torch loads what calls itself its backend, and fails with it: a vendor's build without its driver, say."""
    (site.folder / "vendor_ext.py").write_text("raise ImportError('libvendor.so: cannot open shared object file')")
    info = site.folder / "vendor_ext-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-ext\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nvendor_ext = vendor_ext:autoload\n")
    site.plugin("good")
    found = checks(site.attn("doctor", "--json", timeout=120))
    assert found["torch"]["status"] == "fail"
    assert "vendor_ext" in found["torch"]["detail"]
    assert "libvendor.so" in found["torch"]["detail"]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found["torch"]["hint"]
    for name in ("good", "torch_native"):
        assert "torch does not load" in found[name]["detail"]
        assert "report it" not in (found[name]["hint"] or "")


def test_what_is_preferred_on_a_machine_and_not_installed_is_advice() -> None:
    (advice,) = checkup.advice(Installed(), System.parse("npu:ascend910b"))
    assert advice.detail.endswith("is preferred on npu:ascend910b, and not installed")
    assert (advice.hint or "").startswith("pip install attn-")


def test_a_machine_named_by_hand_is_said_to_be_another() -> None:
    found = {check.name: check.detail for check in checkup.machine_checks(System.parse("cuda:sm_90"))}
    assert "it is not this machine" in found["system"]
