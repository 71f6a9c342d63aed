"""The chip that kernels are chosen for, as facts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: What the interpreter on a CPU pretends to be: few multiprocessors, so that short sequences are split too.
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Chip:
    """``arch`` as manifests name it (sm_90, gfx942), multiprocessors, bytes of shared memory that one block can have."""

    arch: str
    multiprocessors: int
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        """The chip of a device; a CPU is the interpreter."""
        if device.type == "cpu":
            return cls(INTERPRETER, 4, 1 << 20)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            arch = properties.gcnArchName.partition(":")[0]
            return cls(arch, properties.multi_processor_count, 160 << 10 if arch == "gfx950" else 64 << 10)
        arch = f"sm_{properties.major}{properties.minor}"
        return cls(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)

    @property
    def sm(self) -> int:
        """The number of an NVIDIA architecture, else 0."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may begin while the one before it drains (programmatic dependent launch)."""
        return self.sm >= 90
