"""Reading the tables of a manifest: every value checked as it is read, every complaint naming the file and the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from attn_core.errors import ManifestError, nearest


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a manifest while it is read: ``path`` is where in the file ``source`` it stands.

    Every reader raises ManifestError for a value that is not what it reads.
    """

    source: str
    path: str
    data: Mapping[str, Any]

    def at(self, key: str) -> str:
        """The key with its path."""
        return f"{self.path}.{key}" if self.path else key

    def error(
        self, key: str, problem: str, accepted: str | Iterable[Any] | None = None, hint: str | None = None
    ) -> ManifestError:
        """The error for the value at ``key``."""
        return ManifestError(
            f"{self.source}: {self.at(key)} {problem}", given=self.data.get(key), accepted=accepted, hint=hint
        )

    def only(self, known: tuple[str, ...]) -> None:
        """Refuses a key that is not ``known``, suggesting the nearest."""
        for key in self.data:
            if key not in known:
                near = nearest(key, known)
                raise self.error(
                    key, "is not a key of a manifest", known, f"did you mean {near!r}?" if near else "remove it"
                )

    def get(self, key: str, type_: type, what: str, default: Any = None) -> Any:
        """The value, of ``type_``; ``what`` says in words what it should be. Without a default it must be there."""
        if key not in self.data:
            if default is None:
                raise self.error(key, "is missing", what)
            return default
        value = self.data[key]
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            raise self.error(key, f"is {value!r}", what)
        return value

    def positive(self, key: str) -> int | None:
        """An integer from 1, None if it is not there."""
        if key not in self.data:
            return None
        value = self.get(key, int, "an integer from 1")
        if value < 1:
            raise self.error(key, f"is {value}", "an integer from 1")
        return cast(int, value)

    def table(self, key: str) -> Table:
        """The table at ``key``, empty if it is not there."""
        return Table(self.source, self.at(key), self.get(key, dict, "a table", {}))

    def chosen(self, key: str, known: Iterable[str], default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of names, each of ``known``, and each kept once; without a default it must not be empty."""
        known = tuple(known)
        values = self.get(key, list, f"a list of: {', '.join(known)}", None if default is None else list(default))
        for value in values:
            if value not in known:
                near = nearest(str(value), known)
                raise self.error(key, f"has {value!r}", known, f"did you mean {near!r}?" if near else None)
        if not values and default is None:
            raise self.error(key, "is empty", known)
        return tuple(dict.fromkeys(values))
