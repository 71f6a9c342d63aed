"""Branches, barriers, the end, and what a functional model has nothing to do for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from attn_wave.emulator.faults import EmulationError
from attn_wave.emulator.instructions import Instruction
from attn_wave.emulator.wave import EXEC, VCC, Action, Wave, signed

#: Places that are none: the wave waits for its workgroup, or is done.
BARRIER: Final = -2
END: Final = -1

#: Waits, priorities and cache control: without timing and caches there is nothing to do.
IGNORED: Final = frozenset(
    (
        "s_waitcnt", "s_nop", "s_sleep", "s_setprio", "s_inst_prefetch", "s_icache_inv", "s_dcache_wb", "buffer_wbl2",
        "buffer_inv", "v_nop",
    )
)  # fmt: skip

_CONDITIONS: Final[Mapping[str, Callable[[Wave], object]]] = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.scc,
    "s_cbranch_scc1": lambda w: w.scc,
    "s_cbranch_vccz": lambda w: not (w.scalar[VCC] | w.scalar[VCC + 1]),
    "s_cbranch_vccnz": lambda w: w.scalar[VCC] | w.scalar[VCC + 1],
    "s_cbranch_execz": lambda w: not (w.scalar[EXEC] | w.scalar[EXEC + 1]),
    "s_cbranch_execnz": lambda w: w.scalar[EXEC] | w.scalar[EXEC + 1],
}


def control(instruction: Instruction, places: Mapping[int, int]) -> Action | None:
    """The action of an instruction that steers; None if it does not. ``places``: address -> index."""
    name = instruction.name
    if name in IGNORED:
        return lambda w: None
    if name == "s_endpgm":
        return _end
    if name == "s_barrier":
        return lambda w: BARRIER
    if name not in _CONDITIONS:
        return None
    target = instruction.address + 4 + 4 * signed(instruction.operands[0].index & 0xFFFF, 16)
    if target not in places:
        raise EmulationError(f"{instruction.text} goes to {target:#x}, where no instruction begins", given=target)
    place, condition = places[target], _CONDITIONS[name]
    return lambda w: place if condition(w) else None


def _end(w: Wave) -> int:
    w.done = True
    return END
