"""In which order `auto` prefers the backends that can: measured time, then a hook, then the built-in table."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from attn_core.planning.claims import ANY_ARCH, ArchSpec
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.hooks import Hooks
from attn_core.planning.system import System

#: What was measured: for a config, a phase and a system, the seconds of a call for each backend that was measured
#: (by its listed name), or nothing.
Rankings = Callable[[AttentionConfig, Phase, System], Mapping[str, float]]

_TABLE: Final = os.path.join(os.path.dirname(__file__), "preferences.toml")


@dataclass(frozen=True, slots=True)
class Preference:
    """One ``[[prefer]]`` of the built-in table; what it leaves out fits everything."""

    order: tuple[str, ...]
    device: str
    arch: ArchSpec
    kind: str | None
    phases: tuple[str, ...]

    def fits(self, config: AttentionConfig, phase: Phase, system: System) -> bool:
        return (
            self.device == system.device
            and self.arch.allows(system.arch)
            and self.kind in (None, main_kind(config))
            and (not self.phases or phase in self.phases)
        )

    def __str__(self) -> str:
        words = [self.device, str(self.arch) if self.arch.alternatives else "", self.kind or "", *self.phases]
        return "preferred for " + " ".join(filter(None, words))


@dataclass(frozen=True, slots=True)
class Preferences:
    """The built-in table: orders, what comes last, and the distribution of each name it knows."""

    entries: tuple[Preference, ...]
    last: tuple[str, ...]
    distributions: Mapping[str, str]

    def find(self, config: AttentionConfig, phase: Phase, system: System) -> Preference | None:
        """The first entry that fits."""
        return next((entry for entry in self.entries if entry.fits(config, phase, system)), None)


@cache
def preferences() -> Preferences:
    """The table that ships as ``preferences.toml``."""
    with open(_TABLE, "rb") as stream:
        data = tomllib.load(stream)
    return Preferences(
        entries=tuple(map(_preference, data["prefer"])), last=tuple(data["last"]), distributions=data["distributions"]
    )


def _preference(entry: Mapping[str, Any]) -> Preference:
    arch = ArchSpec.parse(entry["arch"]) if "arch" in entry else ANY_ARCH
    return Preference(tuple(entry["order"]), entry["device"], arch, entry.get("kind"), tuple(entry.get("phases", ())))


def main_kind(config: AttentionConfig) -> str:
    """mla if any cached layer is MLA, else mha."""
    return "mla" if any(kind.kind == "mla" for kind in config.cached_kinds) else "mha"


def rank(
    config: AttentionConfig,
    phase: Phase,
    system: System,
    candidates: Sequence[tuple[str, str]],
    hooks: Hooks,
    rankings: Rankings,
) -> list[tuple[str, str]]:
    """(listed name, why it has this place), best first, for ``candidates`` of (listed name, name), all of which can.

    What was measured goes by its time and comes first, then what a hook names, then the table's order, then what the
    table does not know (by name), and last what the table says is last.
    """
    measured = rankings(config, phase, system)
    opinion = hooks.rank(config, phase, system, tuple(listed for listed, _ in candidates))
    hook, hooked = opinion if opinion is not None else ("", ())
    entry = preferences().find(config, phase, system)
    order = entry.order if entry is not None else ()
    last = preferences().last

    def place(candidate: tuple[str, str]) -> tuple[tuple[float, float, str], str]:
        listed, name = candidate
        if listed in measured:
            return (0, measured[listed], listed), f"measured: {measured[listed] * 1e6:.1f} us"
        if listed in hooked:
            return (1, hooked.index(listed), listed), f"ranked by hook {hook}"
        if entry is not None and name in order:
            return (2, order.index(name), listed), str(entry)
        if name in last:
            return (4, last.index(name), listed), "last resort"
        return (3, 0, listed), "not in the preference table"

    placed = sorted((*place(candidate), candidate[0]) for candidate in candidates)
    return [(listed, why) for _, why, listed in placed]
