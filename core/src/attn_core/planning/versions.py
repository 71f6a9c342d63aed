"""Versions, specifiers and requirements, compared as PEP 440 says, without the cost of importing `packaging`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

_RELEASE_END: Final = 1 << 62
_BEFORE_ALPHA: Final = (-1, 0)
_FINAL: Final = (9, 0)
_PRE_LETTERS: Final = {"a": 0, "alpha": 0, "b": 1, "beta": 1, "c": 2, "rc": 2, "pre": 2, "preview": 2}
_VERSION: Final = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>a|alpha|b|beta|c|rc|preview|pre)[-_.]?(?P<pre_n>\d*))?"
    r"(?:-(?P<post_bare>\d+)|(?P<post>[-_.]?(?:post|rev|r)[-_.]?(?P<post_n>\d*)))?"
    r"(?P<dev>[-_.]?dev[-_.]?(?P<dev_n>\d*))?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?",
)
_CLAUSE: Final = re.compile(r"(~=|===|==|!=|<=|>=|<|>)\s*(\S+)")
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(.*)", re.DOTALL)


def normal_name(name: str) -> str:
    """The name of a distribution as registries compare it (PEP 503): ``Attn_Core`` is ``attn-core``."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A PEP 440 version that sorts as PEP 440 says; the local part (``+cu130``) is kept apart and does not sort."""

    epoch: int
    release: tuple[int, ...]
    pre: tuple[int, int]
    post: int
    dev: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """Raises ValueError if ``text`` is not a version."""
        match = _VERSION.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(f"{text!r} is not a version")
        part = match.groupdict()
        is_post = part["post"] is not None or part["post_bare"] is not None
        if part["pre"] is not None:
            pre = (_PRE_LETTERS[part["pre"]], int(part["pre_n"] or 0))
        elif part["dev"] is not None and not is_post:
            pre = _BEFORE_ALPHA  # 1.0.dev1 comes before 1.0a1
        else:
            pre = _FINAL
        return cls(
            epoch=int(part["epoch"] or 0),
            release=_without_zeros(tuple(map(int, part["release"].split(".")))),
            pre=pre,
            post=int(part["post_n"] or part["post_bare"] or 0) if is_post else -1,
            dev=int(part["dev_n"] or 0) if part["dev"] is not None else _RELEASE_END,
        )

    @property
    def is_prerelease(self) -> bool:
        """Alpha, beta, candidate or development release."""
        return self.pre != _FINAL or self.dev != _RELEASE_END

    @property
    def is_postrelease(self) -> bool:
        """Published after the release of the same number."""
        return self.post >= 0


def _without_zeros(release: tuple[int, ...]) -> tuple[int, ...]:
    end = len(release)
    while end > 1 and release[end - 1] == 0:
        end -= 1
    return release[:end]


@dataclass(frozen=True, slots=True)
class Specifier:
    """Bounds on a version, all of which must hold: ``>=1.0,<2``. No bounds allow everything.

    Installed pre-releases count by their order: they are here, nobody is asking to download them.
    """

    text: str
    bounds: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Specifier:
        """Raises ValueError if a bound is not an operator followed by a version."""
        bounds = []
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            match = _CLAUSE.fullmatch(part)
            if match is None:
                raise ValueError(f"{part!r} is not a version bound such as >=1.0")
            operator, version = match.groups()
            if operator == "===":
                raise ValueError(f"{part!r}: === is not supported, use ==")
            wildcard = version.endswith(".*")
            if wildcard and operator not in ("==", "!="):
                raise ValueError(f"{part!r}: a wildcard goes with == or != only")
            Version.parse(version.removesuffix(".*"))
            if operator == "~=" and "." not in version:
                raise ValueError(f"{part!r}: ~= needs at least two numbers")
            bounds.append((operator, version))
        return cls(text=text.strip(), bounds=tuple(bounds))

    def allows(self, version: str) -> bool:
        """Whether ``version`` is within every bound; a text that is not a version is within none."""
        try:
            parsed = Version.parse(version)
        except ValueError:
            return not self.bounds
        return all(_holds(parsed, version, operator, bound) for operator, bound in self.bounds)

    def __str__(self) -> str:
        return self.text or "any version"


def _holds(version: Version, text: str, operator: str, bound: str) -> bool:
    if operator in ("==", "!="):
        return _equals(version, text, bound) == (operator == "==")
    limit = Version.parse(bound)
    match operator:
        case ">=":
            return version >= limit
        case "<=":
            return version <= limit
        case "<":
            return version < _earliest(limit)
        case ">":
            return _is_after(version, limit)
        case _:  # ~=
            family = re.match(r"(?:\d+!)?\d+(?:\.\d+)*", bound.lower().removeprefix("v"))
            assert family is not None  # checked by Specifier.parse
            return version >= limit and _equals(version, text, family[0].rpartition(".")[0] + ".*")


def _earliest(limit: Version) -> Version:
    """Where "<" ends: "<2" leaves out 2.0rc1 and 2.0.dev1 too, unless the bound is itself a pre-release (PEP 440)."""
    if limit.is_prerelease:
        return limit
    return replace(limit, pre=limit.pre if limit.is_postrelease else _BEFORE_ALPHA, dev=0)


def _is_after(version: Version, limit: Version) -> bool:
    """Whether ">" holds: ">1.0" leaves out every 1.0.postN, unless the bound is itself one (PEP 440)."""
    if limit.dev != _RELEASE_END:
        return version > limit
    if limit.is_postrelease:
        return version >= replace(limit, post=limit.post + 1, dev=0)
    return version > limit and (version.epoch, version.release, version.pre) != (limit.epoch, limit.release, limit.pre)


def _equals(version: Version, text: str, bound: str) -> bool:
    if not bound.endswith(".*"):
        return version == Version.parse(bound) and ("+" not in bound or _local(text) == _local(bound))
    prefix = bound.removesuffix(".*").lower().removeprefix("v")
    epoch, _, numbers = prefix.rpartition("!")
    wanted = tuple(map(int, numbers.split(".")))
    have = version.release + (0,) * (len(wanted) - len(version.release))
    return version.epoch == int(epoch or 0) and have[: len(wanted)] == wanted


def _local(text: str) -> str:
    return re.sub(r"[-_.]", ".", text.strip().lower().partition("+")[2])


@dataclass(frozen=True, slots=True)
class Requirement:
    """A distribution with bounds on its version, or several of which one is enough: ``fa-a>=3 | fa-b``."""

    text: str
    choices: tuple[tuple[str, Specifier], ...]

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Raises ValueError for anything but names with version bounds (no extras, no markers, no addresses)."""
        choices = []
        for part in text.split("|"):
            match = _REQUIREMENT.fullmatch(part.strip())
            if match is None:
                raise ValueError(f"{part.strip()!r} is not a distribution with version bounds, such as name>=1.0")
            choices.append((normal_name(match[1]), Specifier.parse(match[2])))
        return cls(text=" | ".join(part.strip() for part in text.split("|")), choices=tuple(choices))

    def satisfied(self, dists: Mapping[str, str]) -> bool:
        """Whether one of the choices is installed in an allowed version; ``dists`` has normal names."""
        return any(name in dists and specifier.allows(dists[name]) for name, specifier in self.choices)

    def found(self, dists: Mapping[str, str]) -> dict[str, str]:
        """The choices that are installed, in whatever version."""
        return {name: dists[name] for name, _ in self.choices if name in dists}

    def __str__(self) -> str:
        return self.text
