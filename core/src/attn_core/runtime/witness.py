"""Witness: which backend really ran each phase, seen from outside a built backend; without one nothing is added."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from torch import Tensor

from attn_core.planning.config import AttentionConfig, Phase
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.conversion import PageTableConversion
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter, Role, phase_of

_FORWARDS: Final = ("forward_extend", "forward_decode", "forward_ragged")


@dataclass(frozen=True, slots=True)
class Sighting:
    """A backend that ran a phase: the name of its entry point and the class whose code it was."""

    phase: Phase
    name: str
    cls: str


class Witness:
    """Call ``backend`` instead of the built one, then read ``sightings``: what ran inside, however deep.

    Every subclass of AttentionBackend is watched while a witness exists, so that a backend which quietly hands its work
    to another is seen as both. ``close()``, or leaving it as a context, ends that; so does forgetting it.
    """

    def __init__(self, built: AttentionBackend) -> None:
        self.built = built
        self.role: Role = built.role if isinstance(built, PhaseRouter) else "target"
        self.counts: dict[Sighting, int] = {}
        self._names = _planned_names(built)
        self.backend: AttentionBackend = _Watched(built, self)
        _watches.begin()
        self._finalizer = weakref.finalize(self, _watches.end)

    @property
    def sightings(self) -> tuple[Sighting, ...]:
        """Every (phase, backend) that ran, in the order of their first call."""
        return tuple(self.counts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what ran, each once."""
        return tuple(dict.fromkeys(sighting.name for sighting in self.counts))

    def by_phase(self) -> dict[Phase, tuple[str, ...]]:
        """For each phase that ran, the names of what ran it."""
        found: dict[Phase, tuple[str, ...]] = {}
        for sighting in self.counts:
            found[sighting.phase] = tuple(dict.fromkeys((*found.get(sighting.phase, ()), sighting.name)))
        return found

    def close(self) -> None:
        """Stop watching; what was seen stays."""
        self._finalizer()

    def __enter__(self) -> Witness:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def record(self, backend: AttentionBackend, batch: ForwardBatch | None) -> None:
        """``backend`` runs ``batch`` (None: a ragged call, which is prefill)."""
        cls = type(backend)
        name = self._names.get(cls) or cls.name or cls.__name__
        for phase in _phases(batch, self.role):
            sighting = Sighting(phase, name, f"{cls.__module__}.{cls.__qualname__}")
            self.counts[sighting] = self.counts.get(sighting, 0) + 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What runs inside is recorded here."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


_active: ContextVar[Witness | None] = ContextVar("attn_witness", default=None)
#: The backend whose forward runs: what it calls of its own is the same sighting.
_running: ContextVar[AttentionBackend | None] = ContextVar("attn_running", default=None)


def _phases(batch: ForwardBatch | None, role: Role) -> tuple[Phase, ...]:
    if batch is None:
        return ("prefill",)
    if batch.mode is not ForwardMode.MIXED:
        return (phase_of(batch.mode, role),)
    decode = (phase_of(ForwardMode.DECODE, role),) if batch.num_decodes else ()
    return (*decode, "prefill") if batch.batch_size > batch.num_decodes else decode


def _planned_names(built: AttentionBackend) -> dict[type, str]:
    """The names by which the classes of a built plan were listed."""
    if not isinstance(built, PhaseRouter):
        return {}
    names = {}
    for phase, backend in built.backends.items():
        inner = backend.inner if isinstance(backend, PageTableConversion) else backend
        names[type(inner)] = built.plan.phases[phase].backend.name
    return names


class _Watches:
    """The classes whose forwards are wrapped, while any witness exists."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._witnesses = 0
        #: (class, forward) -> what it was, and what stands in its place
        self._wrapped: dict[tuple[type, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def begin(self) -> None:
        with self._lock:
            self._witnesses += 1
            self.cover()

    def end(self) -> None:
        with self._lock:
            self._witnesses -= 1
            if self._witnesses:
                return
            for (cls, name), (original, wrapper) in self._wrapped.items():
                if vars(cls).get(name) is wrapper:  # else somebody has put something else there meanwhile
                    setattr(cls, name, original)
            self._wrapped.clear()

    def cover(self) -> None:
        """Wrap the forwards of every backend class there is now, each once."""
        with self._lock:
            if not self._witnesses:
                return
            for cls in _subclasses(AttentionBackend):
                for name in _FORWARDS:
                    if name in vars(cls) and (cls, name) not in self._wrapped:
                        original, wrapper = vars(cls)[name], _recording(vars(cls)[name])
                        self._wrapped[cls, name] = original, wrapper
                        setattr(cls, name, wrapper)


_watches = _Watches()


def _subclasses(cls: type) -> Iterator[type]:
    """Every backend class, but those that only pass calls on."""
    subclasses: list[type] = cls.__subclasses__()
    for sub in subclasses:
        if sub not in (PhaseRouter, PageTableConversion, _Watched):
            yield sub
            yield from _subclasses(sub)


def _recording(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: AttentionBackend, *args: Any, **kwargs: Any) -> Any:
        witness = _active.get()
        if witness is None or _running.get() is self:
            return original(self, *args, **kwargs)
        batch = kwargs.get("batch", args[4] if len(args) > 4 else None)
        witness.record(self, batch if isinstance(batch, ForwardBatch) else None)
        token = _running.set(self)
        try:
            return original(self, *args, **kwargs)
        finally:
            _running.reset(token)

    return forward


class _Watched(AttentionBackend):
    """A built backend, called under the eyes of its witness."""

    def __init__(self, built: AttentionBackend, witness: Witness) -> None:
        super().__init__(built.config, built.kv_cache)
        self._built = built
        self._witness = witness
        self.cuda_graph_seq_len_fill_value = built.cuda_graph_seq_len_fill_value  # type: ignore[misc]

    def warmup(self, config: AttentionConfig) -> None:
        self._built.warmup(config)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        _watches.cover()  # classes that were imported since
        self._built.init_forward_metadata(batch)

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        with self._witness.watching():
            return self._built.forward_extend(q, k, v, layer, batch, **options)

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        with self._witness.watching():
            return self._built.forward_decode(q, k, v, layer, batch, **options)

    def forward_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        _watches.cover()
        with self._witness.watching():
            return self._built.forward_ragged(q, k, v, layer, **options)

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        self._built.write_kv(k, v, layer, slot_mapping)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._built.init_cuda_graph_state(max_batch_size, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        self._built.init_forward_metadata_capture_cuda_graph(batch)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self._built.init_forward_metadata_replay_cuda_graph(batch)
