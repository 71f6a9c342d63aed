"""`attn doctor` on machines with a card, without one, and with half of what a card needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from attn_ascend.doctor import attn_doctor_checks, checks
from attn_core.planning.hooks import DoctorCheck, Hooks

TOOLKIT_INFO = "usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two cards, their driver, CANN and NNAL."""
    for path, text in {
        "dev/davinci0": "",
        "dev/davinci1": "",
        "usr/local/Ascend/driver/version.info": "Version=25.5.0\nascendhal_version=7.35.23\n",
        TOOLKIT_INFO: "package_name=toolkit\nversion=9.1.0\n",
        "usr/local/Ascend/nnal/atb/latest/version.info": "Ascend-cann-atb : 9.1.0\nversion=9.1.0\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def environment(root: Path) -> dict[str, str]:
    toolkit, atb = "usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/nnal/atb/latest"
    return {"ASCEND_HOME_PATH": str(root / toolkit), "ATB_HOME_PATH": str(root / atb)}


PACKAGES = {"torch": "2.13.0+cpu", "torch-npu": "2.13.0"}


def found(root: Path, environ: dict[str, str], dists: dict[str, str]) -> dict[str, DoctorCheck]:
    return {check.name: check for check in checks(root, environ, dists)}


def test_a_complete_machine_is_said_with_its_versions(machine: Path) -> None:
    said = found(machine, environment(machine), PACKAGES)
    assert {name: check.status for name, check in said.items()} == dict.fromkeys(
        ("Ascend card", "Ascend driver", "CANN", "NNAL (ATB)", "torch-npu"), "ok"
    )
    assert said["Ascend card"].detail == "2 (davinci0, davinci1)"
    assert said["Ascend driver"].detail == "25.5.0"
    assert said["CANN"].detail.startswith("9.1.0 in ")
    assert said["torch-npu"].detail == "2.13.0 beside torch 2.13.0+cpu"


def test_a_machine_without_a_card_has_nothing_to_complain_of(tmp_path: Path) -> None:
    (only,) = checks(tmp_path, {}, {"torch": "2.13.0"})
    assert (only.status, "refused" in only.detail) == ("ok", True)


def test_torch_npu_where_nothing_can_load_it_is_a_warning(tmp_path: Path) -> None:
    said = found(tmp_path, {}, PACKAGES)["torch-npu"]
    assert said.status == "warn"
    assert "import torch" in said.detail
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" in (said.hint or "")


BROKEN = [
    ("no driver", ["usr/local/Ascend/driver/version.info"], {}, {}, "Ascend driver", "fail", "install the driver"),
    (
        "no CANN",
        [TOOLKIT_INFO],
        {},
        {},
        "CANN",
        "fail",
        "set_env",
    ),
    ("CANN's environment not set", [], {"ASCEND_HOME_PATH": ""}, {}, "CANN", "fail", "source"),
    ("no NNAL", ["usr/local/Ascend/nnal/atb/latest/version.info"], {}, {}, "NNAL (ATB)", "warn", "install the NNAL"),
    ("NNAL's environment not set", [], {"ATB_HOME_PATH": ""}, {}, "NNAL (ATB)", "warn", "source"),
    ("no torch-npu", [], {}, {"torch-npu": None}, "torch-npu", "fail", "torch-npu==2.13.0"),
    ("another torch-npu", [], {}, {"torch-npu": "2.9.0"}, "torch-npu", "fail", "torch-npu==2.13.0"),
    ("no torch", [], {}, {"torch": None}, "torch-npu", "fail", "pip install torch"),
]


@pytest.mark.parametrize(
    ("what", "removed", "environ", "packages", "check", "status", "hint"), BROKEN, ids=[row[0] for row in BROKEN]
)
def test_what_is_missing_is_said_with_what_to_do(
    machine: Path,
    what: str,
    removed: list[str],
    environ: dict[str, str],
    packages: dict[str, str | None],
    check: str,
    status: str,
    hint: str,
) -> None:
    for path in removed:
        (machine / path).unlink()
    dists = {name: version for name, version in {**PACKAGES, **packages}.items() if version is not None}
    said = found(machine, {**environment(machine), **environ}, dists)
    assert said[check].status == status
    assert hint in (said[check].hint or "")
    others = {name: other.status for name, other in said.items() if name != check}
    assert set(others.values()) == {"ok"}


def test_the_hook_is_one_that_the_core_calls() -> None:
    import attn_ascend.doctor

    hooks = Hooks()
    hooks.add(attn_ascend.doctor, "ascend")
    assert hooks.problems == []
    assert hooks.doctor_checks() == attn_doctor_checks()
