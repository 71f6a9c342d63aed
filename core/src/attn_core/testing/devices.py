"""Where the kit runs: ``cpu``, ``cuda``, ``npu``, ``xpu``, or ``emulated:NAME`` of an installed emulator.

A distribution that can stand in for hardware has an entry point in the group ``attn.emulators``:

    [project.entry-points."attn.emulators"]
    gfx942 = "attn_wave.emulator:Gfx942"

and the object it names is an `Emulator`, or a class of one. ``attn verify wave --device emulated:gfx942`` then
enters it, plans for its system, puts tensors on its device and writes evidence at its level. The core knows none.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Literal, Protocol, cast

import torch

from attn_core.errors import PluginLoadError, UsageError, nearest
from attn_core.planning.claims import normal_arch
from attn_core.planning.discovery import BackendRef
from attn_core.planning.distributions import scan
from attn_core.planning.system import System, detect

EMULATORS_GROUP: Final = "attn.emulators"
Level = Literal["silicon", "isa-emulated", "contract-emulated"]
#: What an emulator may say of itself: never silicon.
EMULATED_LEVELS: Final = ("isa-emulated", "contract-emulated")
_PREFIX: Final = "emulated:"
_REAL: Final = ("cpu", "cuda", "npu", "xpu")


class Emulator(Protocol):
    """A stand-in for hardware, a context in which the backends for it run here.

    ``level`` says what it proves: ``isa-emulated`` if the compiled machine code runs, ``contract-emulated`` if our code
    runs on stand-ins that carry the vendor's operator schemas. ``name`` is what evidence calls the device. A slow one
    may have ``max_cases`` too: how many cases a run has at most.
    """

    level: str
    name: str

    def system(self) -> System:
        """What plans are made for: the hardware that is stood in for, with the libraries that are here."""

    def device(self) -> torch.device:
        """Where the kit's tensors lie."""

    def versions(self) -> Mapping[str, str]:
        """What else the evidence is about: the emulator, the schemas it stands in for."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run takes place, and what its evidence may say."""

    text: str
    system: System
    device: torch.device
    name: str
    level: Level
    versions: Mapping[str, str] = field(default_factory=dict)
    #: positive cases that an emulator has time for, spread over everything there is to show; None for all
    max_cases: int | None = None


@contextmanager
def at(text: str) -> Iterator[Place]:
    """The place called ``text``; an emulator is entered and left. torch uses one thread in it: the cases are small, and
    many threads on a few cores take longer than one.

    Raises UsageError for a device that is not known or not here, PluginLoadError for an emulator that cannot be used.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        yield _entered(text, stack)


def _entered(text: str, stack: ExitStack) -> Place:
    if not text.startswith(_PREFIX):
        return _real(text)
    emulator = enter_emulator(text.removeprefix(_PREFIX), stack)
    system = emulator.system()
    name = system.name or emulator.name
    return Place(
        text, system, emulator.device(), name, cast(Level, emulator.level), emulator.versions(), _limit(emulator)
    )


def _limit(emulator: Emulator) -> int | None:
    """The emulator's ``max_cases``, if it has one: an emulator of machine code is slow."""
    limit: int | None = getattr(emulator, "max_cases", None)
    return limit


def _real(text: str) -> Place:
    if text not in _REAL:
        near = nearest(text, [*_REAL, *(f"{_PREFIX}{name}" for name in emulators())])
        raise UsageError(
            f"device {text!r}",
            given=text,
            accepted=(*_REAL, f"{_PREFIX}NAME"),
            hint=f"did you mean {near!r}?" if near else "attn verify --help names the devices",
        )
    if text == "cpu":
        return Place(text, detect("cpu", environ={}), torch.device("cpu"), device_name(text), "silicon")
    library = getattr(torch, text, None)
    if library is None or not library.is_available():
        raise UsageError(
            f"there is no {text} device here",
            given=text,
            accepted="cpu, or a device that torch can use",
            hint="attn doctor",
        )
    system = detect(environ={})
    # detect() knows the driver, torch knows what it was built for: the device asked for is the one that is tested
    same = system.device == text or (text, system.device) == ("cuda", "rocm")
    system = system if same else replace(system, device=text, arch=None)
    if system.arch is None:  # a container without the vendor's tool
        system = replace(system, arch=_arch(text, library))
    return Place(text, system, torch.device(text), device_name(text), "silicon")


def _arch(device: str, library: Any) -> str | None:
    """The chip, as torch names it."""
    if device == "npu":
        return normal_arch(library.get_device_name())
    if device == "cuda" and torch.version.hip is None:
        major, minor = library.get_device_capability()
        return f"sm_{major}{minor}"
    if device == "cuda":
        return str(library.get_device_properties(0).gcnArchName).partition(":")[0]
    return None


def device_name(device: str) -> str:
    """What its maker calls the device that torch calls ``device``."""
    return _cpu_name() if device == "cpu" else str(torch.get_device_module(device).get_device_name())


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def emulators() -> dict[str, str]:
    """Installed emulators: name -> ``module:object``, read without importing any."""
    return {name: value for d in scan(None).values() for name, value in d.entry_points(EMULATORS_GROUP)}


def own_emulators(ref: BackendRef) -> list[str]:
    """The devices that the distribution of a backend emulates, as ``emulated:NAME``."""
    owner = scan(None).get(ref.dist)
    return [f"{_PREFIX}{name}" for name, _ in owner.entry_points(EMULATORS_GROUP)] if owner is not None else []


def enter_emulator(name: str, stack: ExitStack) -> Emulator:
    """The emulator called ``name``, entered for as long as ``stack`` is. Raises as `load_emulator` does."""
    emulator = load_emulator(name)
    try:
        stack.enter_context(emulator)
    except ImportError as error:
        raise PluginLoadError(
            f"emulator {name!r} needs what is not here: {error}",
            given=name,
            hint=f"pip install {error.name.partition('.')[0]}" if error.name else "attn doctor shows what is missing",
        ) from error
    return emulator


def load_emulator(name: str) -> Emulator:
    """The emulator called ``name``, imported and made. Raises UsageError, or PluginLoadError with the cause."""
    known = emulators()
    if name not in known:
        near = nearest(name, known)
        raise UsageError(
            f"no installed distribution emulates {name!r}",
            given=name,
            accepted=tuple(known) or "none is installed",
            hint=f"did you mean {_PREFIX}{near}?" if near else f"it needs an entry point in {EMULATORS_GROUP}",
        )
    module, _, attribute = known[name].partition(":")
    try:
        found = getattr(importlib.import_module(module.strip()), attribute.strip())
        emulator = cast(Emulator, found() if isinstance(found, type) else found)
    except Exception as error:
        raise PluginLoadError(f"emulator {name!r} ({known[name]}): {type(error).__name__}: {error}") from error
    if emulator.level not in EMULATED_LEVELS:
        raise PluginLoadError(
            f"emulator {name!r} says its level is {emulator.level!r}", given=emulator.level, accepted=EMULATED_LEVELS
        )
    return emulator
