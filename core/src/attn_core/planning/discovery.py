"""Which backends are installed: entry points and manifests become BackendRef or Problem, and no plugin code runs."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from attn_core.errors import AmbiguousBackendError, AttnError, ManifestError, PluginError, UnknownBackendError, nearest
from attn_core.planning.distributions import Distribution, scan
from attn_core.planning.filters import DENY_VARIABLE, Filter
from attn_core.planning.locating import module_exists, package_folder
from attn_core.planning.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path  # 5 ms, and listing backends needs none

#: Entry point group of backends.
BACKENDS_GROUP: Final = "attn.backends"
#: Where backends come from that were registered in this process.
IN_PROCESS: Final = "in-process"

_OBJECT: Final = re.compile(
    r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\s*:\s*(?P<attr>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
)


@dataclass(frozen=True, slots=True)
class BackendRef:
    """A backend that is installed, not imported.

    listed: the name to call it by; ``name@dist`` where several distributions claim the name (``ambiguous``).
    object: ``module:attribute`` of the class. location: the manifest's file. cls: the class itself, for backends that
    were registered in this process.
    """

    name: str
    dist: str
    version: str
    object: str
    manifest: Manifest
    listed: str
    location: str = ""
    ambiguous: bool = False
    cls: type | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """An entry point that is no usable backend: ``code`` is broken_plugin or disabled, ``message`` the root cause."""

    name: str
    dist: str
    version: str
    listed: str
    code: str
    message: str
    hint: str | None = None
    error: AttnError | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.listed} ({self.dist} {self.version}): {self.message}"


@dataclass(frozen=True, slots=True)
class Installed:
    """What discovery found: each entry point once, as a backend or as a problem; ``notes`` say what else is odd."""

    backends: tuple[BackendRef, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which the backends can be called."""
        return tuple(ref.listed for ref in self.backends)

    def has(self, name: str) -> bool:
        """Whether an entry point claims ``name`` (or ``name@dist``), usable or not."""
        claims: tuple[BackendRef | Problem, ...] = (*self.backends, *self.problems)
        return any(name in (claim.listed, claim.name, f"{claim.name}@{claim.dist}") for claim in claims)

    def find(self, name: str) -> BackendRef:
        """The backend called ``name`` or ``name@dist``.

        Raises AmbiguousBackendError for a bare name of several distributions, PluginError for one that is broken or
        disabled, UnknownBackendError for one that nobody has.
        """
        matches = [ref for ref in self.backends if name in (ref.listed, ref.name, f"{ref.name}@{ref.dist}")]
        if len(matches) == 1 and (not matches[0].ambiguous or "@" in name):
            return matches[0]
        problems = [p for p in self.problems if name in (p.listed, p.name, f"{p.name}@{p.dist}")]
        if len(matches) > 1 or (matches and matches[0].ambiguous):
            listed = [ref.listed for ref in matches] + [p.listed for p in problems if p.code != "disabled"]
            raise AmbiguousBackendError(
                f"several distributions have a backend {name!r}",
                given=name,
                accepted=listed,
                hint=f"name one of them in full, or leave a distribution out with {DENY_VARIABLE}",
            )
        if problems:
            problem = problems[0]
            raise PluginError(f"backend {name!r} cannot be used: {problem.message}", given=name, hint=problem.hint)
        near = nearest(name, [ref.listed for ref in self.backends])
        raise UnknownBackendError(
            f"no installed backend is called {name!r}",
            given=name,
            accepted=self.names or "none is installed",
            hint=f"did you mean {near!r}?" if near else "attn list-backends shows what is installed",
        )


def discover(path: Iterable[str] | None = None, environ: Mapping[str, str] | None = None) -> Installed:
    """Every backend on ``path`` (default sys.path) and every one registered in this process.

    Reads entry points and manifests, imports nothing of them. One that is broken or left out by ATTN_PLUGINS or
    ATTN_DISABLE is a Problem; nothing is raised for it.
    """
    filter_ = Filter.read(environ)
    owners = [
        (d, e) for d in scan(None if path is None else list(path)).values() if (e := d.entry_points(BACKENDS_GROUP))
    ]
    found: list[BackendRef | Problem] = []
    for distribution, entries in owners:
        left_out = filter_.leaves_out(distribution.name)
        counts = Counter(name for name, _ in entries)
        for name, value in dict(entries).items():
            if left_out:
                found.append(_problem(name, distribution, "disabled", left_out, "change the variable to use it"))
            elif counts[name] > 1:
                found.append(
                    _problem(name, distribution, "broken_plugin", f"its entry points name {name!r} twice", None)
                )
            else:
                found.append(_backend(name, value, distribution))
    found += _registered.values()
    named = _listed(found)
    return Installed(
        backends=tuple(item for item in named if isinstance(item, BackendRef)),
        problems=tuple(item for item in named if isinstance(item, Problem)),
        notes=filter_.notes({distribution.name for distribution, _ in owners}),
    )


def _backend(name: str, value: str, distribution: Distribution) -> BackendRef | Problem:
    """One entry point, read down to its manifest; whatever is wrong with it becomes a Problem."""
    try:
        target = _OBJECT.fullmatch(re.sub(r"\s*\[.*\]$", "", value))
        if target is None:
            raise ManifestError(f"entry point {name} = {value!r}", accepted="module:Class")
        module = target["module"]
        package = module.partition(".")[0]
        folder = package_folder(distribution, package)
        if folder is None:
            raise PluginError(
                f"entry point {name} = {value!r}: package {package!r} is not there", hint=_reinstall(distribution)
            )
        location = os.path.join(folder, f"{name}.toml")
        manifest = read_manifest(location)
        if not module_exists(folder, module):
            raise PluginError(
                f"entry point {name} = {value!r}: module {module!r} is not there", hint=_reinstall(distribution)
            )
        if manifest.name != name:
            raise ManifestError(f"{location}: name is {manifest.name!r}, the entry point is {name!r}", accepted=name)
    except AttnError as error:
        hint = "; ".join(filter(None, (error.accepted and f"accepted: {error.accepted}", error.hint)))
        return _problem(name, distribution, "broken_plugin", error.message, hint or None, error)
    object_ = f"{module}:{target['attr']}"
    return BackendRef(name, distribution.name, distribution.version, object_, manifest, name, location)


def read_manifest(location: str) -> Manifest:
    """The manifest in the file ``location``. Raises ManifestError if it is missing, unreadable or malformed."""
    try:
        with open(location, encoding="utf-8") as stream:
            text = stream.read()
    except FileNotFoundError as error:
        raise ManifestError(
            f"there is no manifest {location}", hint="it goes beside the package's __init__.py"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"manifest {location} cannot be read: {error}") from error
    return Manifest.parse(text, source=location)


def _reinstall(distribution: Distribution) -> str:
    return f"pip install --force-reinstall {distribution.name}"


def _problem(
    name: str, distribution: Distribution, code: str, message: str, hint: str | None, error: AttnError | None = None
) -> Problem:
    return Problem(name, distribution.name, distribution.version, name, code, message, hint, error)


def _listed(found: list[BackendRef | Problem]) -> list[BackendRef | Problem]:
    """Sorted by name; a name that several claim becomes ``name@dist``, and only for those left in does it count."""
    usable = Counter(item.name for item in found if not _disabled(item))
    every = Counter(item.name for item in found)
    named: list[BackendRef | Problem] = []
    for item in found:
        full = f"{item.name}@{item.dist}"
        if isinstance(item, BackendRef) and usable[item.name] > 1:
            named.append(replace(item, listed=full, ambiguous=True))
        elif usable[item.name] > 1 or (_disabled(item) and every[item.name] > 1):
            named.append(replace(item, listed=full))
        else:
            named.append(item)
    return sorted(named, key=lambda item: item.listed)


def _disabled(item: BackendRef | Problem) -> bool:
    return isinstance(item, Problem) and item.code == "disabled"


_registered: dict[str, BackendRef] = {}


class Registration:
    """A backend registered in this process; ``unregister()``, or leaving it as a context, takes it back."""

    def __init__(self, ref: BackendRef) -> None:
        self.ref = ref

    def unregister(self) -> None:
        """Takes the backend back; a second time does nothing."""
        if _registered.get(self.ref.name) is self.ref:
            del _registered[self.ref.name]

    def __enter__(self) -> BackendRef:
        return self.ref

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unregister()


def register(cls: type, manifest: Manifest | Mapping[str, Any] | str | Path) -> Registration:
    """Makes ``cls`` a backend of this process, for tests and notebooks: what an entry point and a manifest do.

    ``manifest`` is a Manifest, its TOML text, the same as a mapping, or a Path. Raises ManifestError for a bad one,
    AmbiguousBackendError if the name is registered already.
    """
    if isinstance(manifest, os.PathLike):
        manifest = read_manifest(os.fspath(manifest))
    if not isinstance(manifest, Manifest):
        manifest = Manifest.parse(manifest, source=f"<manifest of {cls.__qualname__}>")
    if manifest.name in _registered:
        raise AmbiguousBackendError(
            f"a backend {manifest.name!r} is already registered in this process",
            given=manifest.name,
            hint="unregister it",
        )
    object_ = f"{cls.__module__}:{cls.__qualname__}"
    ref = BackendRef(manifest.name, IN_PROCESS, "", object_, manifest, manifest.name, manifest.source, cls=cls)
    _registered[ref.name] = ref
    return Registration(ref)


def unregister(name: str) -> None:
    """Takes back what was registered as ``name``. Raises UnknownBackendError if nothing was."""
    if name not in _registered:
        raise UnknownBackendError(
            f"no backend {name!r} was registered in this process", given=name, accepted=tuple(_registered)
        )
    del _registered[name]
