"""Which accelerator is here, from /proc, /sys, /dev and the vendors' tools: no torch, and nothing that can hang us."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Final

from attn_core.planning.claims import normal_arch
from attn_core.planning.distributions import InstalledVersions
from attn_core.planning.system import System

#: Seconds that a vendor's tool may take before we go on without it.
TOOL_TIMEOUT: Final = 5.0
_MIB: Final = 1 << 20


def probe(root: str = "/", environ: Mapping[str, str] | None = None) -> System:
    """The first accelerator that this process may use (cuda, rocm, npu, in this order), else the CPU.

    An accelerator that the installed torch is not built for is the CPU, with a note that says so.
    Intel's XPUs are not looked for, since every laptop has one: name them with ATTN_FORCE_SYSTEM=xpu.
    """
    environ = os.environ if environ is None else environ
    dists = InstalledVersions()
    cpu = System(device="cpu", dists=dists)
    for find in (_cuda, _rocm, _npu):
        found = find(root, environ, dists)
        if found is None:
            continue
        reason = _unusable(found.device, dists)
        if reason is None:
            return found
        cpu = System(device="cpu", dists=dists, note=f"{found.name or found} is here, but {reason}")
    return cpu


def _unusable(device: str, dists: Mapping[str, str]) -> str | None:
    """Why torch cannot drive ``device``; a build says in its local version what it is for, where it says it at all."""
    torch = dists.get("torch")
    if torch is None:
        return None
    build = torch.partition("+")[2]
    if (device == "cuda" and build.startswith(("cpu", "rocm"))) or (
        device == "rocm" and build.startswith(("cpu", "cu"))
    ):
        return f"the installed torch {torch} is not built for {device}"
    if device == "npu" and "torch-npu" not in dists:
        return "torch-npu is not installed"
    return None


def _cuda(root: str, environ: Mapping[str, str], dists: Mapping[str, str]) -> System | None:
    if not any(
        os.path.exists(os.path.join(root, path)) for path in ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg")
    ):
        return None
    rows = []
    listing = _ask(
        environ, "nvidia-smi", "--query-gpu=index,uuid,compute_cap,memory.total,name", "--format=csv,noheader,nounits"
    )
    for line in listing.splitlines():
        cells = [cell.strip() for cell in line.split(",", 4)]
        if len(cells) == 5 and re.fullmatch(r"\d+\.\d+", cells[2]):
            rows.append(cells)
    if rows:
        visible = _first_visible(environ.get("CUDA_VISIBLE_DEVICES"), [(row[0], row[1]) for row in rows])
        if visible is None:
            return None
        _, _, capability, memory, name = rows[visible]
        arch = f"sm_{capability.replace('.', '')}"
        return System("cuda", arch, int(memory) * _MIB if memory.isdigit() else None, dists, name=name)
    names = list(_proc_names(root))
    if (
        not names
        or _first_visible(environ.get("CUDA_VISIBLE_DEVICES"), [(str(i), "") for i in range(len(names))]) is None
    ):
        return None
    note = "nvidia-smi did not answer, so the architecture is unknown: name it with ATTN_FORCE_SYSTEM=cuda:sm_90"
    return System("cuda", None, None, dists, name=names[0], note=note)


def _proc_names(root: str) -> Iterator[str]:
    folder = os.path.join(root, "proc/driver/nvidia/gpus")
    for entry in _listdir(folder):
        match = re.search(r"^Model:\s*(.+?)\s*$", _read(os.path.join(folder, entry, "information")), re.MULTILINE)
        yield match[1] if match else "NVIDIA GPU"


def _rocm(root: str, environ: Mapping[str, str], dists: Mapping[str, str]) -> System | None:
    if not os.path.exists(os.path.join(root, "dev/kfd")):
        return None
    folder = os.path.join(root, "sys/class/kfd/kfd/topology/nodes")
    gpus = []
    for node in sorted(_listdir(folder), key=lambda name: (len(name), name)):
        facts = _properties(os.path.join(folder, node, "properties"))
        version = facts.get("gfx_target_version", 0)
        if version:
            banks = os.path.join(folder, node, "mem_banks")
            memory = sum(
                _properties(os.path.join(banks, b, "properties")).get("size_in_bytes", 0) for b in _listdir(banks)
            )
            gpus.append((f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}", memory or None))
    ids = [(str(i), "") for i in range(len(gpus))]
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if gpus and variable in environ:
            visible = _first_visible(environ[variable], ids)
            return None if visible is None else System("rocm", gpus[visible][0], gpus[visible][1], dists)
    return System("rocm", gpus[0][0], gpus[0][1], dists) if gpus else None


def _npu(root: str, environ: Mapping[str, str], dists: Mapping[str, str]) -> System | None:
    cards = sorted(name for name in _listdir(os.path.join(root, "dev")) if re.fullmatch(r"davinci\d+", name))
    if not cards or _first_visible(environ.get("ASCEND_RT_VISIBLE_DEVICES"), [(n[7:], "") for n in cards]) is None:
        return None
    table = _ask(environ, "npu-smi", "info")
    chip = re.search(
        r"^\|\s*\d+\s+(?:Ascend)?(\d\S*)\s*\|\s*(?:OK|Warning|Alarm|Critical|UNKNOWN)", table, re.MULTILINE | re.I
    )
    memory = re.findall(r"\d+\s*/\s*(\d+)\s*\|\s*$", table, re.MULTILINE)
    if chip is None:
        note = "npu-smi did not answer, so the chip is unknown: name it with ATTN_FORCE_SYSTEM=npu:ascend910b"
        return System("npu", None, None, dists, name="Ascend NPU", note=note)
    largest = max(map(int, memory), default=0)
    return System("npu", normal_arch(f"ascend{chip[1]}"), largest * _MIB or None, dists, name=f"Ascend {chip[1]}")


def _first_visible(variable: str | None, devices: list[tuple[str, str]]) -> int | None:
    """Index of the first of ``devices`` (index, uuid) that a *_VISIBLE_DEVICES variable leaves, None if none."""
    if variable is None:
        return 0 if devices else None
    first = variable.split(",")[0].strip()
    for i, (index, uuid) in enumerate(devices):
        if first and (first == index or (uuid and not first.isdigit() and uuid.startswith(first))):
            return i
    # a MIG slice (MIG-...) is a slice of a card that the tool does list
    return 0 if first.startswith("MIG-") and devices else None


def _ask(environ: Mapping[str, str], tool: str, *arguments: str) -> str:
    """What a vendor's tool prints, or nothing: a tool that is missing, fails or hangs tells us nothing."""
    import shutil  # these three cost 15 ms, and most machines that list backends have no vendor's tool to ask
    import signal
    import subprocess

    path = shutil.which(tool, path=environ.get("PATH"))
    if path is None:
        return ""
    try:
        process = subprocess.Popen(
            [path, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError:
        return ""
    try:
        output, _ = process.communicate(timeout=TOOL_TIMEOUT)
    except subprocess.TimeoutExpired:
        # its whole session, and no wait: a tool stuck in the driver cannot be killed, and must not hold us
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return ""
    return output if process.returncode == 0 else ""


def _properties(path: str) -> dict[str, int]:
    facts = {}
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if value.strip().isdigit():
            facts[key] = int(value)
    return facts


def _listdir(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""
