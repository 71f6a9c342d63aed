"""Calling the hooks of plugins: a broken one is a warning, never a crash; pluggy is imported only if there is one."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.distributions import scan
from attn_core.planning.filters import Filter
from attn_core.planning.patience import not_in_silence
from attn_core.planning.system import System

if TYPE_CHECKING:
    import pluggy

#: Entry point group of hook plugins; a value names a module, or ``module:object``, that has hook implementations.
HOOKS_GROUP: Final = "attn.hooks"


class HookWarning(UserWarning):
    """A hook plugin could not be loaded or raised; it was left out."""


@dataclass(frozen=True, slots=True)
class DoctorCheck:
    """One line of ``attn doctor``: what was checked, how it stands, what was found, and what to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class FallbackEvent:
    """A phase that the named backend lacks by design runs on another; ``chain`` has every link between them."""

    phase: Phase
    wanted: str
    chosen: str
    chain: tuple[str, ...]

    def __str__(self) -> str:
        via = f" (via {' -> '.join(self.chain)})" if len(self.chain) > 2 else ""
        return f"{self.phase} runs on {self.chosen}{via}: {self.wanted} has none, and its manifest names this fallback"


class Hooks:
    """The loaded hook plugins. ``problems`` has a line for each that could not be loaded, or raised when called."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._manager: pluggy.PluginManager | None = None

    def add(self, plugin: object, name: str) -> None:
        """Takes a plugin in; one whose hooks do not match the specifications becomes a problem."""
        if self._manager is None:
            import pluggy

            from attn_core.planning import hookspecs

            self._manager = pluggy.PluginManager("attn")
            self._manager.add_hookspecs(hookspecs)
        try:
            self._manager.register(plugin, name)
        except Exception as error:
            self._manager.unregister(name=name)  # pluggy keeps the hooks that came before the wrong one
            self._broken(name, error)

    def rank(
        self, config: AttentionConfig, phase: Phase, system: System, candidates: tuple[str, ...]
    ) -> tuple[str, tuple[str, ...]] | None:
        """(plugin, its order of names) of the first plugin with an opinion, else None."""
        for name, order in self._calls("attn_rank", config=config, phase=phase, system=system, candidates=candidates):
            if order is None:
                continue
            unknown = [other for other in order if other not in candidates]
            if unknown:
                self._broken(
                    name, ValueError(f"attn_rank named {', '.join(map(str, unknown))}, which cannot run {phase}")
                )
            return name, tuple(other for other in order if other in candidates)
        return None

    def doctor_checks(self) -> list[DoctorCheck]:
        """The checks of all plugins."""
        return [check for _, checks in self._calls("attn_doctor_checks") for check in checks or ()]

    def fallback(self, event: FallbackEvent) -> None:
        """Tells every plugin of the event."""
        for _ in self._calls("attn_fallback", event=event):
            pass

    def _calls(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of each plugin, called one by one so that one that raises does not silence the others."""
        if self._manager is None:
            return
        plugins = dict(self._manager.list_name_plugin())
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            others = [plugin for name, plugin in plugins.items() if name != implementation.plugin_name]
            try:
                result = self._manager.subset_hook_caller(hook, others)(**arguments)
            except (Exception, SystemExit) as error:
                self._broken(implementation.plugin_name, error)
            else:
                yield from ((implementation.plugin_name, value) for value in result)

    def _broken(self, name: str, error: BaseException) -> None:
        line = f"hook plugin {name!r} was left out: {type(error).__name__}: {' '.join(str(error).split())}"
        self.problems.append(line)
        warnings.warn(line, HookWarning, stacklevel=2)


_registered: dict[str, object] = {}


@contextlib.contextmanager
def registered_hooks(plugin: object, name: str = "in-process") -> Iterator[None]:
    """Within this context ``plugin`` (a module or object with hook implementations) takes part in planning."""
    _registered[name] = plugin
    try:
        yield
    finally:
        _registered.pop(name, None)


def load_hooks(path: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Hooks:
    """The hook plugins of all distributions that ATTN_PLUGINS and ATTN_DISABLE let in, and those of this process.

    This is the one place of planning that imports plugin code, and only the modules named in the group ``attn.hooks``.
    """
    hooks = Hooks()
    filter_ = Filter.read(environ)
    for distribution in scan(path).values():
        for name, value in distribution.entry_points(HOOKS_GROUP):
            if filter_.leaves_out(distribution.name) is None:
                _load(hooks, name, distribution.name, partial(_resolve, value))
    for name, plugin in _registered.items():
        hooks.add(plugin, name)
    return hooks


def _load(hooks: Hooks, entry: str, dist: str, resolve: Callable[[], object]) -> None:
    name = f"{entry} of {dist}"
    try:
        # stdout is data
        with contextlib.redirect_stdout(sys.stderr), not_in_silence(f"hook plugin {name!r}", "importing it", dist):
            plugin = resolve()
    except (Exception, SystemExit) as error:
        hooks._broken(name, error)
    else:
        hooks.add(plugin, name)


def _resolve(value: str) -> object:
    module, _, attribute = value.partition(":")
    target: object = importlib.import_module(module.strip())
    for part in filter(None, attribute.strip().split(".")):
        target = getattr(target, part)
    return target
