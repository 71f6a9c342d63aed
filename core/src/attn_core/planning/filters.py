"""Which distributions the user lets in: the allow-list ATTN_PLUGINS and the deny-list ATTN_DISABLE."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attn_core.errors import nearest
from attn_core.planning.versions import normal_name

#: Allow-list of distributions; set but empty means none. Commas or spaces between names.
ALLOW_VARIABLE: Final = "ATTN_PLUGINS"
#: Deny-list of distributions; it wins over the allow-list.
DENY_VARIABLE: Final = "ATTN_DISABLE"
#: The core's own distribution: the allow-list is about plugins and never leaves it out, the deny-list may.
CORE_DISTRIBUTION: Final = "attn-core"


@dataclass(frozen=True, slots=True)
class Filter:
    """Both lists, as normal names; ``allow`` None lets every distribution in."""

    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Filter:
        """The lists of the environment."""
        environ = os.environ if environ is None else environ
        allow = environ.get(ALLOW_VARIABLE)
        return cls(None if allow is None else _names(allow), _names(environ.get(DENY_VARIABLE, "")))

    def leaves_out(self, distribution: str) -> str | None:
        """Why ``distribution`` (a normal name) is left out, None if it is not."""
        if distribution in self.deny:
            return f"{DENY_VARIABLE} names {distribution}"
        if self.allow is not None and distribution not in self.allow and distribution != CORE_DISTRIBUTION:
            return f"{ALLOW_VARIABLE} does not name {distribution}"
        return None

    def notes(self, known: set[str]) -> tuple[str, ...]:
        """One line for each name that no distribution of ``known`` has: probably a slip that would pass unseen."""
        notes = []
        for variable, names in ((ALLOW_VARIABLE, self.allow or frozenset()), (DENY_VARIABLE, self.deny)):
            for name in sorted(names - known):
                near = nearest(name, known)
                hint = f"; did you mean {near}?" if near else ""
                notes.append(f"{variable} names {name}, which is no installed distribution with backends{hint}")
        return tuple(notes)


def _names(text: str) -> frozenset[str]:
    return frozenset(normal_name(name) for name in re.split(r"[,\s]+", text) if name)
