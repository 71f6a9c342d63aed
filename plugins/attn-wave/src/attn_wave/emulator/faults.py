"""What the emulator raises when machine code does what a chip would not survive, or what is not modelled."""

from __future__ import annotations

from attn_core.errors import KernelError


class EmulationError(KernelError):
    """The code object cannot be run: an instruction, an operand or a form of it that is not modelled."""

    code = "emulation_failed"


class MemoryFaultError(EmulationError):
    """An access outside every buffer of the launch, outside the LDS, or a write to what is only read."""

    code = "memory_fault"
