"""The checks of `attn doctor`: the machine, torch, drivers, versions, and every plugin, each in its own process."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from attn_core.cli.isolated import Outcome, run_isolated
from attn_core.cli.listing import core_version, in_words
from attn_core.planning.discovery import BackendRef, Installed
from attn_core.planning.distributions import Distribution, scan
from attn_core.planning.filters import CORE_DISTRIBUTION
from attn_core.planning.hooks import DoctorCheck
from attn_core.planning.manifest import PROTOCOL_VERSION
from attn_core.planning.ranking import preferences
from attn_core.planning.reasons import availability
from attn_core.planning.system import System
from attn_core.planning.versions import Requirement

#: a plugin that takes longer to import, torch apart, is worth a word
SLOW_IMPORT_SECONDS: Final = 3.0
#: how an extension that was compiled against another torch fails to load
_ABI_SIGNS: Final = ("undefined symbol", "symbol not found", "version `GLIBCXX", "libtorch", "libc10")

_DRIVERS: Final = (
    ("NVIDIA driver", "/proc/driver/nvidia/version", r"\s(\d+\.\d+(?:\.\d+)?)\s"),
    ("AMD driver", "/sys/module/amdgpu/version", r"(\S+)"),
    ("ROCm", "/opt/rocm/.info/version", r"(\S+)"),
)


def machine_checks(system: System) -> Iterator[DoctorCheck]:
    """What this machine is: interpreter, processor, accelerator, drivers, and the core itself."""
    yield DoctorCheck(
        "python",
        "ok",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    )
    yield DoctorCheck(
        "attn-core",
        "ok",
        f"{core_version()}, protocol {PROTOCOL_VERSION}, {os.path.dirname(sys.modules['attn_core'].__file__ or '')}",
    )
    about = ", ".join(
        filter(None, (system.name, f"{system.memory / 2**30:.0f} GiB" if system.memory else "", system.note))
    )
    forced = " (named by ATTN_FORCE_SYSTEM; it is not this machine)" if system.forced else ""
    yield DoctorCheck("system", "warn" if system.note else "ok", f"{system}{forced}{': ' + about if about else ''}")
    for name, path, pattern in _DRIVERS:
        version = _version_in(path, pattern)
        if version:
            yield DoctorCheck(name, "ok", version)


def _version_in(path: str, pattern: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            match = re.search(pattern, stream.read(), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def torch_check(system: System, timeout: float) -> DoctorCheck:
    """Whether torch loads, and drives the device that the system is."""
    outcome = run_isolated("torch", timeout=timeout)
    problem = _problem(outcome)
    extension = _failing_extension(outcome)
    if extension:
        return DoctorCheck(
            "torch",
            "fail",
            f"`import torch` loads the extension {extension} by itself, and that fails: {problem}",
            f"give {extension} what it lacks, or uninstall it; TORCH_DEVICE_BACKEND_AUTOLOAD=0 leaves extensions out",
        )
    if outcome.report is None or problem:
        return DoctorCheck("torch", "fail", problem or "", "pip install --force-reinstall torch")
    report = outcome.report
    built = f"CUDA {report['cuda']}" if report["cuda"] else f"ROCm {report['hip']}" if report["hip"] else "the CPU"
    devices = ", ".join(report["devices"]) or "cpu"
    detail = f"{report['version']} built for {built}, loads in {outcome.seconds:.1f} s; devices: {devices}"
    if system.device in ("cuda", "rocm", "npu") and not system.forced and not report["devices"]:
        hint = "install the build of torch, or of its extension, for this driver"
        return DoctorCheck("torch", "fail", f"{detail}; it does not see the {system}", hint)
    return DoctorCheck("torch", "ok", detail)


def plugin_checks(installed: Installed, system: System, timeout: float) -> list[DoctorCheck]:
    """One check for each entry point: what discovery says is broken, and how the others behave when they are loaded."""
    broken = [
        DoctorCheck(p.listed, "warn" if p.code == "disabled" else "fail", f"{p.dist} {p.version}: {p.message}", p.hint)
        for p in installed.problems
    ]
    # Two at a time: each is a process that imports torch.
    with ThreadPoolExecutor(max_workers=2) as pool:
        loaded = list(pool.map(lambda ref: _plugin_check(ref, system, timeout), installed.backends))
    return broken + loaded


def _plugin_check(ref: BackendRef, system: System, timeout: float) -> DoctorCheck:
    who = f"{ref.dist} {ref.version}"
    if not ref.manifest.speaks_protocol:
        detail = f"{who}: speaks protocol {ref.manifest.protocol}, this core {PROTOCOL_VERSION}; not loaded"
        return DoctorCheck(ref.listed, "fail", detail, "upgrade the older one of attn-core and the plugin")
    reasons = availability(ref.manifest, system)
    absent = next((r for r in reasons if r.code in ("missing_dist", "dist_version")), None)
    outcome = run_isolated("backend", ref.object, timeout=timeout)
    problem = _problem(outcome)
    if _failing_extension(outcome):
        return DoctorCheck(
            ref.listed, "fail", f"{who}: not loaded, since torch does not load", "see the check of torch"
        )
    if problem is None:
        return _loaded_check(ref, who, outcome, "; ".join(in_words(each.to_json()) for each in reasons))
    if absent is not None:
        return DoctorCheck(ref.listed, "warn", f"{who}: {in_words(absent.to_json())}", absent.hint)
    if any(sign in problem for sign in _ABI_SIGNS):
        return DoctorCheck(
            ref.listed,
            "fail",
            f"{who}: built against another torch: {problem}",
            f"pip install --force-reinstall {ref.dist}",
        )
    return DoctorCheck(ref.listed, "fail", f"{who}: {problem}", f"report it to the authors of {ref.dist}")


def _loaded_check(ref: BackendRef, who: str, outcome: Outcome, unusable: str) -> DoctorCheck:
    assert outcome.report is not None
    report = outcome.report
    if not report["is_backend"]:
        return DoctorCheck(
            ref.listed,
            "fail",
            f"{who}: {ref.object} is no AttentionBackend",
            "derive it from attn_core.AttentionBackend",
        )
    if report["abstract"]:
        return DoctorCheck(
            ref.listed, "fail", f"{who}: {ref.object} lacks {', '.join(report['abstract'])}", "write them"
        )
    findings = []
    if outcome.printed.strip():
        findings.append(f"prints on import: {outcome.printed.strip().splitlines()[0]!r}")
    if report["seconds"] > SLOW_IMPORT_SECONDS:
        findings.append(f"takes {report['seconds']:.1f} s to import")
    if findings:
        return DoctorCheck(
            ref.listed, "warn", f"{who}: {'; '.join(findings)}", "a plugin does nothing when it is imported"
        )
    but = f"; cannot run here: {unusable}" if unusable else ""
    return DoctorCheck(ref.listed, "ok", f"{who}: loads in {report['seconds']:.1f} s{but}")


def _failing_extension(outcome: Outcome) -> str | None:
    """The extension of torch without which torch does not load, if that was the problem."""
    return None if outcome.report is None else outcome.report.get("extension")


def _problem(outcome: Outcome) -> str | None:
    """What went wrong in the child, in one line; None if nothing did."""
    if outcome.report is None:
        return outcome.problem
    if "error" in outcome.report:
        if outcome.report["error"] == "SystemExit":
            return str(outcome.report["message"])
        return f"{outcome.report['error']}: {outcome.report['message']}"
    return None


def hook_checks(timeout: float) -> list[DoctorCheck]:
    """What the hook plugins found, and what is wrong with them."""
    outcome = run_isolated("hooks", timeout=timeout)
    problem = _problem(outcome)
    if outcome.report is None or problem:
        return [DoctorCheck("hooks", "fail", problem or "", "ATTN_DISABLE leaves a distribution out")]
    broken = [DoctorCheck("hooks", "fail", line) for line in outcome.report["problems"]]
    return broken + [DoctorCheck(**check) for check in outcome.report["checks"]]


def version_checks(installed: Installed) -> Iterator[DoctorCheck]:
    """Requirements of the core and of plugin distributions that what is installed does not meet."""
    distributions = scan()
    versions = {name: each.version for name, each in distributions.items()}
    owners = {ref.dist for ref in installed.backends} | {problem.dist for problem in installed.problems}
    for name in sorted({CORE_DISTRIBUTION, *owners} & distributions.keys()):
        for requirement in _requirements(distributions[name]):
            if not requirement.satisfied(versions):
                found = ", ".join(f"{n} {v}" for n, v in requirement.found(versions).items())
                # What is not there at all is the manifest's to judge: plugins may be installed without their library.
                if found:
                    yield DoctorCheck(
                        f"{name} needs", "fail", f"{requirement}, found {found}", f"pip install '{requirement}'"
                    )


def _requirements(distribution: Distribution) -> Iterator[Requirement]:
    """The unconditional Requires-Dist of a distribution that plain bounds can express."""
    for line in (distribution.read("METADATA") or "").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key == "Requires-Dist" and ";" not in value:
            try:
                yield Requirement.parse(re.sub(r"\[.*?\]|[()]", "", value.strip()))
            except ValueError:
                continue


def advice(installed: Installed, system: System) -> Iterator[DoctorCheck]:
    """What to install to get more: libraries of backends that fit this machine, and backends preferred on it."""
    for ref in installed.backends:
        reasons = availability(ref.manifest, system)
        if reasons and all(r.layer == "installed" for r in reasons):
            for each in reasons:
                yield DoctorCheck("to get more", "ok", f"{ref.listed} would run here with {each.wanted}", each.hint)
    table = preferences()
    fitting = [entry for entry in table.entries if entry.device == system.device and entry.arch.allows(system.arch)]
    for name in dict.fromkeys(name for entry in fitting for name in entry.order):
        if not installed.has(name):
            install = f"pip install {table.distributions[name]}"
            yield DoctorCheck("to get more", "ok", f"{name} is preferred on {system}, and not installed", install)
