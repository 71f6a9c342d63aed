"""The machine as facts: named by hand, forced by a variable, or found in fake /proc, /sys and /dev trees."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attn_core.errors import UsageError
from attn_core.planning import probe as probing
from attn_core.planning.probe import probe
from attn_core.planning.system import System, detect


@pytest.mark.parametrize(
    ("text", "device", "arch"),
    [
        ("cpu", "cpu", None),
        ("cuda:sm_90", "cuda", "sm_90"),
        ("CUDA:SM_90a", "cuda", "sm_90"),
        ("cuda:sm_100", "cuda", "sm_100"),
        (" rocm:gfx942 ", "rocm", "gfx942"),
        ("npu:ascend910b", "npu", "ascend910b"),
        ("xpu", "xpu", None),
        ("cpu:x86_64", "cpu", "x86_64"),
    ],
)
def test_a_system_is_named_by_device_and_chip(text: str, device: str, arch: str | None) -> None:
    system = System.parse(text)
    assert (system.device, system.arch, system.forced) == (device, arch, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cuda", ["does not say which chip", "cuda:sm_90"]),
        ("cuda:", ["does not say which chip"]),
        ("npu", ["npu:ascend910b"]),
        ("xpu:", ["does not say which chip"]),
        ("cdua:sm_90", ["not known", "did you mean 'cuda:sm_90'?"]),
        ("h100", ["not known", "cpu, cuda:sm_90"]),
        ("", ["not known"]),
        ("cuda:90", ["no CUDA architecture"]),
        ("cuda:gfx942", ["no CUDA architecture"]),
        ("npu:sm_90", ["no Ascend chip", "npu:ascend910b"]),
        ("rocm:sm_90", ["no ROCm architecture", "rocm:gfx942"]),
    ],
)
def test_what_is_no_system_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        System.parse(text)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("text", ["cpu", "cuda:sm_90", "npu:ascend910b"])
def test_a_system_prints_as_it_is_named(text: str) -> None:
    assert str(System.parse(text)) == text


class Machine:
    """A root folder with fake device trees, and a PATH with fake vendor's tools."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {"PATH": str(root / "bin")}
        (root / "bin").mkdir()

    def file(self, path: str, text: str = "") -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def tool(self, name: str, script: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!{sys.executable}\n{script}\n")
        path.chmod(0o755)

    def probe(self, **environ: str) -> System:
        return probe(str(self.root), {**self.environ, **environ})

    def detect(self, force: str | None = None, **environ: str) -> System:
        return detect(force, root=str(self.root), environ={**self.environ, **environ})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(probing, "InstalledVersions", dict)
    return Machine(tmp_path)


SMI = "print('0, GPU-aaa, 9.0, 81559, NVIDIA H100 80GB HBM3'); print('1, GPU-bbb, 8.0, 40960, NVIDIA A100, 40GB')"


def hopper(machine: Machine, script: str = SMI) -> Machine:
    machine.file("proc/driver/nvidia/version", "NVRM version")
    machine.tool("nvidia-smi", script)
    return machine


def test_a_machine_with_nothing_is_a_cpu(machine: Machine) -> None:
    assert machine.probe() == System("cpu", dists={})


def test_a_cuda_machine_is_what_nvidia_smi_says(machine: Machine) -> None:
    found = hopper(machine).probe()
    assert (str(found), found.memory, found.name) == ("cuda:sm_90", 81559 << 20, "NVIDIA H100 80GB HBM3")
    assert not found.forced


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", "cuda:sm_90"),
        ("1,0", "cuda:sm_80"),
        ("GPU-bbb", "cuda:sm_80"),
        ("GPU-b", "cuda:sm_80"),
        ("MIG-1234", "cuda:sm_90"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("7", "cpu"),
    ],
)
def test_only_devices_that_are_visible_count(machine: Machine, visible: str, expected: str) -> None:
    assert str(hopper(machine).probe(CUDA_VISIBLE_DEVICES=visible)) == expected


@pytest.mark.parametrize(
    "script",
    [
        "import sys; sys.exit(9)",
        "print('NVIDIA-SMI has failed')",
        "print('0, GPU-a, [N/A], 1, x')",
        "this is no python",
    ],
)
def test_a_tool_that_fails_leaves_the_driver_as_witness(machine: Machine, script: str) -> None:
    hopper(machine, script).file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA H100\nIRQ: 1\n")
    found = machine.probe()
    assert (found.device, found.arch, found.name) == ("cuda", None, "NVIDIA H100")
    assert "ATTN_FORCE_SYSTEM=cuda:sm_90" in found.note


def test_a_tool_that_is_not_there_leaves_the_driver_as_witness(machine: Machine) -> None:
    machine.file("proc/driver/nvidia/version")
    machine.file("proc/driver/nvidia/gpus/0/information", "Model: NVIDIA L4")
    assert machine.probe().name == "NVIDIA L4"


def test_a_driver_with_no_card_is_a_cpu(machine: Machine) -> None:
    machine.file("proc/driver/nvidia/version")
    assert str(machine.probe()) == "cpu"


def test_a_tool_that_hangs_with_children_cannot_hold_us(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TOOL_TIMEOUT", 0.5)
    hopper(machine, "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)")
    machine.file("proc/driver/nvidia/gpus/0/information", "Model: NVIDIA L4")
    machine.environ["PATH"] += os.pathsep + os.environ["PATH"]
    start = time.monotonic()
    assert machine.probe().arch is None
    assert time.monotonic() - start < 20  # a hang is 60 s; a slow machine is not one


def kfd(machine: Machine, *versions: int) -> Machine:
    machine.file("dev/kfd")
    for i, version in enumerate(versions):
        node = f"sys/class/kfd/kfd/topology/nodes/{i}"
        machine.file(f"{node}/properties", f"simd_count {64 if version else 0}\ngfx_target_version {version}\nname x\n")
        machine.file(f"{node}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {1000 * (i + 1)}\n")
    return machine


@pytest.mark.parametrize(
    ("version", "arch"),
    [
        (90402, "gfx942"),
        (90500, "gfx950"),
        (90010, "gfx90a"),
        (110000, "gfx1100"),
        (120001, "gfx1201"),
        (90008, "gfx908"),
    ],
)
def test_a_rocm_machine_is_what_the_kernel_says(machine: Machine, version: int, arch: str) -> None:
    found = kfd(machine, 0, version).probe()
    assert (found.device, found.arch, found.memory) == ("rocm", arch, 2000)


def test_a_kfd_with_no_gpu_is_a_cpu(machine: Machine) -> None:
    assert str(kfd(machine, 0, 0).probe()) == "cpu"


@pytest.mark.parametrize("variable", ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_rocm_devices_can_be_hidden(machine: Machine, variable: str) -> None:
    kfd(machine, 0, 90402, 90500)
    assert str(machine.probe(**{variable: "1"})) == "rocm:gfx950"
    assert str(machine.probe(**{variable: "-1"})) == "cpu"


NPU_SMI = '''print("""+--------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                         |
+---------------------------+---------------+------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)       Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)    |
+===========================+===============+================================================+
| 0     910B3               | OK            | 93.6        40            0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0      3161 / 65536         |
+===========================+===============+================================================+""")'''


def test_an_npu_machine_is_what_npu_smi_says(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "InstalledVersions", lambda: {"torch": "2.13.0+cpu", "torch-npu": "2.13.0"})
    machine.file("dev/davinci0")
    machine.file("dev/davinci_manager")
    machine.tool("npu-smi", NPU_SMI)
    found = machine.probe()
    assert (str(found), found.memory, found.name) == ("npu:ascend910b3", 65536 << 20, "Ascend 910B3")
    assert str(machine.probe(ASCEND_RT_VISIBLE_DEVICES="")) == "cpu"


def test_an_npu_whose_tool_is_missing_has_no_chip(machine: Machine) -> None:
    machine.file("dev/davinci0")
    found = machine.probe()
    assert (found.device, found.arch) == ("npu", None)
    assert "ATTN_FORCE_SYSTEM=npu:ascend910b" in found.note


def test_a_manager_without_a_card_is_no_npu(machine: Machine) -> None:
    machine.file("dev/davinci_manager")
    assert str(machine.probe()) == "cpu"


@pytest.mark.parametrize(
    ("build", "prepare", "expected"),
    [
        ("2.13.0+cpu", hopper, "cpu"),
        ("2.13.0+cu130", hopper, "cuda:sm_90"),
        ("2.13.0", hopper, "cuda:sm_90"),
        ("2.13.0+rocm7.0", hopper, "cpu"),
        ("2.13.0+cu130", lambda m: kfd(m, 90402), "cpu"),
        ("2.13.0+rocm7.0", lambda m: kfd(m, 90402), "rocm:gfx942"),
    ],
)
def test_a_torch_that_is_not_built_for_the_device_leaves_the_cpu_with_a_note(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, build: str, prepare: Callable[[Machine], Machine], expected: str
) -> None:
    monkeypatch.setattr(probing, "InstalledVersions", lambda: {"torch": build})
    found = prepare(machine).probe()
    assert str(found) == expected
    assert (build in found.note) is (expected == "cpu")


@pytest.mark.parametrize(
    ("force", "variable", "expected", "forced"),
    [
        (None, "", "cuda:sm_90", False),
        (None, "cuda:sm_100", "cuda:sm_100", True),
        ("rocm:gfx942", "cuda:sm_100", "rocm:gfx942", True),
        (None, "cuda:sm_90", "cuda:sm_90", False),
        (None, "cuda:sm_90a", "cuda:sm_90", False),
        (None, "cpu", "cpu", False),
        ("cpu", "", "cpu", False),
    ],
)
def test_a_named_system_is_forced_unless_it_is_the_one_we_are_on(
    machine: Machine, force: str | None, variable: str, expected: str, forced: bool
) -> None:
    found = hopper(machine).detect(force, ATTN_FORCE_SYSTEM=variable)
    assert (str(found), found.forced) == (expected, forced)


def test_naming_the_chip_helps_a_machine_that_cannot_tell_its_own(machine: Machine) -> None:
    machine.file("proc/driver/nvidia/version")
    machine.file("proc/driver/nvidia/gpus/0/information", "Model: NVIDIA H100")
    found = machine.detect(ATTN_FORCE_SYSTEM="cuda:sm_90")
    assert (str(found), found.forced) == ("cuda:sm_90", False)


def test_a_malformed_variable_is_refused(machine: Machine) -> None:
    with pytest.raises(UsageError, match="not known"):
        machine.detect(ATTN_FORCE_SYSTEM="gpu")
