"""The installed distributions, read from the folders of sys.path: importlib.metadata would cost 40 ms, this costs 3."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from attn_core.planning.versions import normal_name


@dataclass(frozen=True, slots=True)
class Distribution:
    """One installed distribution: its normal name, version, and the ``.dist-info`` (or ``.egg-info``) folder."""

    name: str
    version: str
    folder: str

    def read(self, file: str) -> str | None:
        """The text of a metadata file, or None if it has none (or none that can be read)."""
        try:
            with open(os.path.join(self.folder, file), encoding="utf-8", errors="replace") as stream:
                return stream.read()
        except OSError:
            return None

    def entry_points(self, group: str) -> list[tuple[str, str]]:
        """(name, value) of every entry point of ``group``, in the order of the file."""
        text = self.read("entry_points.txt")
        return _section(text, group) if text and group in text else []


def scan(path: Sequence[str] | None = None) -> dict[str, Distribution]:
    """Every distribution on ``path`` (default sys.path) by normal name; the first of a name wins, as in an import."""
    found: dict[str, Distribution] = {}
    for folder in _folders(sys.path if path is None else path):
        try:
            entries = sorted(os.listdir(folder))
        except OSError:  # not there, not a folder (a zip), or not ours to read: nothing can be imported from it either
            continue
        for entry in entries:
            # what begins with ~ is the rest of a distribution that pip could not remove
            if entry.endswith((".dist-info", ".egg-info")) and not entry.startswith("~"):
                distribution = _distribution(folder, entry)
                if distribution is not None:
                    found.setdefault(distribution.name, distribution)
    return found


class InstalledVersions(Mapping[str, str]):
    """Normal name -> version of what is installed, scanned when it is first asked for."""

    __slots__ = ("_versions",)

    def __init__(self) -> None:
        self._versions: dict[str, str] | None = None

    def _read(self) -> dict[str, str]:
        if self._versions is None:
            self._versions = {name: dist.version for name, dist in scan().items()}
        return self._versions

    def __getitem__(self, name: str) -> str:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return "InstalledVersions()" if self._versions is None else f"InstalledVersions({self._versions!r})"


def _folders(path: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for entry in path:
        folder = os.path.realpath(entry or os.curdir)
        if folder not in seen:
            seen.add(folder)
            yield folder


def _distribution(folder: str, entry: str) -> Distribution | None:
    stem = entry.rpartition(".")[0]
    location = os.path.join(folder, entry)
    if entry.endswith(".egg-info"):
        name, version = _from_pkg_info(location)
    else:
        name, _, version = stem.rpartition("-")
    return Distribution(normal_name(name), version, location) if name and version else None


def _from_pkg_info(location: str) -> tuple[str, str]:
    """An egg-info folder of a development install has no version in its name: it is in PKG-INFO."""
    name = version = ""
    try:
        with open(os.path.join(location, "PKG-INFO"), encoding="utf-8", errors="replace") as stream:
            for line in stream:
                key, colon, value = line.partition(":")
                if not colon:
                    break
                if key == "Name":
                    name = value.strip()
                elif key == "Version":
                    version = value.strip()
    except OSError:
        pass
    return name, version


def _section(text: str, group: str) -> list[tuple[str, str]]:
    entries = []
    inside = False
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("[") and line.endswith("]"):
            inside = line[1:-1].strip() == group
        elif inside and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            entries.append((name.strip(), value.strip()))
    return entries
