"""What `attn doctor` says of an Ascend machine: cards, driver, CANN, NNAL and torch-npu, from files alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from attn_core.planning.distributions import InstalledVersions
from attn_core.planning.hooks import DoctorCheck
from attn_core.planning.hookspecs import hookimpl

_DRIVER: Final = "usr/local/Ascend/driver/version.info"
_TOOLKITS: Final = ("usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit/latest")
_NNAL: Final = "usr/local/Ascend/nnal/atb/latest"
#: Files below a package that state its version, as ``version=8.5.0`` or ``Version=8.5.0``.
_VERSION_FILES: Final = (
    "version.info",
    "*/ascend_*_install.info",
    "ascend_*_install.info",
    "version.cfg",
    "*/version.info",
)


@hookimpl
def attn_doctor_checks() -> list[DoctorCheck]:
    """The checks of this machine."""
    return list(checks(Path("/"), os.environ, InstalledVersions()))


def checks(root: Path, environ: Mapping[str, str], dists: Mapping[str, str]) -> Iterator[DoctorCheck]:
    """Cards and driver first, then CANN, NNAL, torch-npu: each needs those before it."""
    cards = sorted(path.name for path in (root / "dev").glob("davinci[0-9]*"))
    if not cards:
        yield DoctorCheck("Ascend card", "ok", "none here: the backend ascend is refused on this machine")
        if "torch-npu" in dists and not environ.get("ASCEND_HOME_PATH"):
            yield DoctorCheck(
                "torch-npu", "warn", f"{dists['torch-npu']} without CANN: torch loads it, so `import torch` fails",
                "pip uninstall torch-npu, or TORCH_DEVICE_BACKEND_AUTOLOAD=0",
            )  # fmt: skip
        return
    yield DoctorCheck("Ascend card", "ok", f"{len(cards)} ({', '.join(cards)})")
    yield _driver(root)
    yield _toolkit(root, environ)
    yield _nnal(root, environ)
    yield _torch_npu(dists)


def _driver(root: Path) -> DoctorCheck:
    version = _stated(root / _DRIVER)
    if version is None:
        return DoctorCheck(
            "Ascend driver", "fail", f"no version in /{_DRIVER}", "install the driver, or mount it into the container"
        )
    return DoctorCheck("Ascend driver", "ok", version)


def _toolkit(root: Path, environ: Mapping[str, str]) -> DoctorCheck:
    named = environ.get("ASCEND_HOME_PATH")
    for folder in [Path(named)] if named else [root / path for path in _TOOLKITS]:
        version = _version_below(folder)
        if version is not None and named:
            return DoctorCheck("CANN", "ok", f"{version} in {folder}")
        if version is not None:
            hint = f"source {folder / 'set_env.sh'}"
            return DoctorCheck("CANN", "fail", f"{version} in {folder}, and its environment is not set", hint)
    where = (
        f"not in {named}, which ASCEND_HOME_PATH names"
        if named
        else f"not in {' or '.join('/' + p for p in _TOOLKITS)}"
    )
    return DoctorCheck("CANN", "fail", where, "install the CANN toolkit and kernels, then source its set_env.sh")


def _nnal(root: Path, environ: Mapping[str, str]) -> DoctorCheck:
    folder = Path(environ["ATB_HOME_PATH"]) if environ.get("ATB_HOME_PATH") else root / _NNAL
    version = _version_below(folder) or _version_below(folder.parent)
    if version is None:
        return DoctorCheck(
            "NNAL (ATB)", "warn", "not here: MLA copies a step's pages, and aclnn's operator writes the cache",
            "install the NNAL package of your CANN, then source its set_env.sh",
        )  # fmt: skip
    if not environ.get("ATB_HOME_PATH"):
        return DoctorCheck(
            "NNAL (ATB)", "warn", f"{version}, and its environment is not set", f"source {folder.parent / 'set_env.sh'}"
        )
    return DoctorCheck("NNAL (ATB)", "ok", version)


def _torch_npu(dists: Mapping[str, str]) -> DoctorCheck:
    have, torch = dists.get("torch-npu"), dists.get("torch")
    if torch is None:
        return DoctorCheck(
            "torch-npu", "fail", "torch is not installed", "pip install torch, then the torch-npu of the same version"
        )
    wanted = ".".join(torch.split("+")[0].split(".")[:3])
    if have is None:
        return DoctorCheck(
            "torch-npu", "fail", f"not installed beside torch {torch}", f"pip install torch-npu=={wanted}"
        )
    if have.split(".")[:2] != torch.split(".")[:2]:
        hint = f"pip install torch-npu=={wanted}, if it is for your CANN"
        return DoctorCheck("torch-npu", "fail", f"{have} beside torch {torch}: they must be of one version", hint)
    return DoctorCheck("torch-npu", "ok", f"{have} beside torch {torch}")


def _version_below(folder: Path) -> str | None:
    """The version that a CANN package states about itself."""
    for pattern in _VERSION_FILES:
        for path in sorted(folder.glob(pattern)):
            version = _stated(path)
            if version is not None:
                return version
    return None


def _stated(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"^\s*(?:package_)?version\s*=\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return match[1] if match else None
