"""The machine as facts: System, what this one is, and how to speak of one that is not here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from attn_core.errors import UsageError, nearest
from attn_core.planning.claims import normal_arch
from attn_core.planning.distributions import InstalledVersions

#: Environment variable that makes every command plan for another machine: ``cuda:sm_100``.
FORCE_VARIABLE: Final = "ATTN_FORCE_SYSTEM"
#: Devices whose backends depend on the chip, with an example of how to name one.
_EXAMPLES: Final = {"cuda": "cuda:sm_90", "rocm": "rocm:gfx942", "npu": "npu:ascend910b"}
_DEVICES: Final = ("cpu", "cuda", "rocm", "npu", "xpu")


@dataclass(frozen=True, slots=True)
class System:
    """Where attention is to run.

    device: cpu, cuda, rocm, npu or xpu. arch: the chip (sm_90, gfx942, ascend910b), None if unknown.
    memory: bytes of one device, None if unknown. dists: normal name -> version of what is installed here.
    forced: it is not the machine we are on, so its libraries cannot be judged. name and note are for people.
    """

    device: str
    arch: str | None = None
    memory: int | None = None
    dists: Mapping[str, str] = field(default_factory=InstalledVersions, repr=False, hash=False)
    forced: bool = False
    name: str = ""
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> System:
        """From ``cpu``, ``cuda:sm_90``, ``rocm:gfx942``, ``npu:ascend910b`` or ``xpu``, as a machine that is not here.

        Raises UsageError for an unknown device, or a device whose backends depend on the chip without one.
        """
        device, colon, arch = text.strip().lower().partition(":")
        if device not in _DEVICES:
            near = nearest(device, _DEVICES)
            raise UsageError(
                f"system {text!r} is not known",
                given=text,
                accepted=("cpu", *_EXAMPLES.values(), "xpu"),
                hint=f"did you mean {_EXAMPLES.get(near, near)!r}?" if near else None,
            )
        if (device in _EXAMPLES or colon) and not arch.strip():
            raise UsageError(
                f"system {text!r} does not say which chip", given=text, accepted=_EXAMPLES.get(device, device)
            )
        chip = normal_arch(arch) if arch else None
        if device == "cuda" and chip is not None and not (chip.startswith("sm_") and chip[3:].isdigit()):
            raise UsageError(
                f"system {text!r}: {arch!r} is no CUDA architecture", given=text, accepted="cuda:sm_90, cuda:sm_100"
            )
        if device == "rocm" and chip is not None and not chip.startswith("gfx"):
            raise UsageError(f"system {text!r}: {arch!r} is no ROCm architecture", given=text, accepted="rocm:gfx942")
        if device == "npu" and chip is not None and not chip.startswith("ascend"):
            raise UsageError(f"system {text!r}: {arch!r} is no Ascend chip", given=text, accepted="npu:ascend910b")
        return cls(device=device, arch=chip, forced=True)

    def __str__(self) -> str:
        return f"{self.device}:{self.arch}" if self.arch else self.device


def detect(force: str | None = None, *, root: str = "/", environ: Mapping[str, str] | None = None) -> System:
    """The machine we are on, or the one that ``force`` or the variable ATTN_FORCE_SYSTEM names.

    Looks at /proc, /sys and /dev below ``root`` and asks the vendors' tools, each with a time limit; torch is not
    imported. A machine that is named and is this one (its CPU counts) is not ``forced``: its libraries are judged.
    Raises UsageError for a name that is not a system.
    """
    from attn_core.planning.probe import probe

    environ = os.environ if environ is None else environ
    wanted = force if force is not None else environ.get(FORCE_VARIABLE)
    if not wanted:
        return probe(root, environ)
    named = System.parse(wanted)
    if named.device == "cpu":
        return replace(named, forced=False)
    here = probe(root, environ)
    if here.device == named.device and (here.arch is None or normal_arch(here.arch) == named.arch):
        return replace(here, arch=named.arch)
    return named
