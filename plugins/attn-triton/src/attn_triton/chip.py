"""The chip that kernels are chosen for, as facts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.runtime import driver

#: What the interpreter on a CPU pretends to be: few multiprocessors, so that short sequences are split too.
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Chip:
    """``arch`` as manifests name it (sm_90, gfx942), multiprocessors, bytes of shared memory that one block can
    have.
    """

    arch: str
    multiprocessors: int
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        """The chip of a device; a CPU is the interpreter."""
        if device.type == "cpu":
            return cls(INTERPRETER, 4, 1 << 20)
        properties = torch.cuda.get_device_properties(device)
        shared = driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
        if torch.version.hip is None:
            return cls(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, shared)
        return cls(properties.gcnArchName.partition(":")[0], properties.multi_processor_count, shared)

    @property
    def sm(self) -> int:
        """The number of an NVIDIA architecture, else 0."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may begin while the one before it drains (programmatic dependent launch)."""
        return self.sm >= 90
