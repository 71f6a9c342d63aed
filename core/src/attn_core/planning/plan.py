"""Which backend runs each phase, why, and why not the others: `plan` decides it once, and nothing is decided later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

from attn_core.errors import (
    BackendRefusedError,
    ConfigError,
    NoBackendError,
    ProtocolError,
    UnknownBackendError,
    UsageError,
    nearest,
)
from attn_core.planning.candidates import Board, Candidate, fallback_choices, survey
from attn_core.planning.config import PHASES, AttentionConfig, Phase
from attn_core.planning.discovery import BackendRef, Installed, discover
from attn_core.planning.hooks import FallbackEvent, Hooks, load_hooks
from attn_core.planning.joint import Choice, choose
from attn_core.planning.measured import load_timings, rankings_from, tuned_path
from attn_core.planning.ranking import Rankings, preferences, rank
from attn_core.planning.reasons import Decision, Reason, evaluate
from attn_core.planning.system import System, detect

AUTO: Final = "auto"
#: Why a backend that the user named has its place.
NAMED: Final = "named"
FallbackPolicy = Literal["warn", "error", "allow"]


class FallbackWarning(UserWarning):
    """A phase runs on another backend than the one named, since that has no such phase by design."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What runs one phase.

    decision: the evaluation with the page size and layout of the plan. page_size is the cache's, native_page_size what
    the backend is given, in tokens. fallback: every link from the named backend to this one, empty if it was chosen
    directly. why: what put it here.
    """

    phase: Phase
    backend: BackendRef
    decision: Decision
    page_size: int
    native_page_size: int
    why: str
    fallback: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """Whether the user named it, or the backend that it stands in for."""
        return self.why == NAMED or bool(self.fallback)

    @property
    def converted(self) -> bool:
        """Whether the page table is rewritten to smaller pages in every step."""
        return self.native_page_size != self.page_size


@dataclass(frozen=True, slots=True)
class Plan:
    """A backend for each phase, all on one cache.

    config: with ``page_size`` and ``kv_layout`` filled in. phases: what runs, in the order of the phases.
    trace: for each phase every candidate exactly once. notes: what else the user should know.
    """

    config: AttentionConfig
    system: System
    phases: Mapping[Phase, PhasePlan]
    trace: Mapping[Phase, tuple[Candidate, ...]]
    notes: tuple[str, ...] = ()

    @property
    def backends(self) -> tuple[BackendRef, ...]:
        """The chosen backends, each once."""
        return tuple({phase.backend.listed: phase.backend for phase in self.phases.values()}.values())

    def explain(self) -> str:
        """The plan and its whole trace, for people."""
        from attn_core.planning.explain import explain

        return explain(self)

    def to_json(self) -> dict[str, Any]:
        """The plan and its whole trace as JSON data, of the schema ``attn/plan``, version 1."""
        from attn_core.planning.explain import plan_json

        return plan_json(self)


def plan(
    config: AttentionConfig,
    backend: str | Mapping[Phase, str] = AUTO,
    *,
    system: System | str | None = None,
    installed: Installed | None = None,
    fallback: FallbackPolicy = "warn",
    rankings: Rankings | None = None,
    phases: Sequence[Phase] | None = None,
    build_refusals: Mapping[tuple[str, Phase], Sequence[Reason]] = MappingProxyType({}),
) -> Plan:
    """Chooses a backend for each phase of ``config``, with one page size and one KV layout for all.

    ``backend`` is ``"auto"``, a name, ``"prefill=fa3,decode=flashinfer"`` or the same as a mapping; a phase that is not
    named is ``auto``. A named backend is used or refused, but what it lacks by design goes to its manifest's
    ``[fallback]`` list, with ``fallback`` a warning, allowed, or an error.
    ``system`` (or its text, ``"cuda:sm_90"``) and ``installed`` default to this machine, ``rankings`` to what
    ``attn tune`` measured on it, ``phases`` to those that the config needs.
    ``build_refusals`` is what built backends refused, by (listed name, phase): planning again leaves them out.

    Raises UsageError for a malformed ``backend``, UnknownBackendError, AmbiguousBackendError or PluginError for a name
    that cannot be used, BackendRefusedError (ProtocolError) for a named backend that cannot do it, NoBackendError if
    nothing takes a phase, NoCommonCacheError if no page size and layout is shared, FallbackCycleError.
    """
    if fallback not in get_args(FallbackPolicy):
        raise ConfigError(f"fallback policy {fallback!r}", given=fallback, accepted=get_args(FallbackPolicy))
    phases = tuple(phase for phase in (config.phases if phases is None else phases) if config.kinds(phase))
    asked = parse_backend(backend)
    system = detect() if system is None else System.parse(system) if isinstance(system, str) else system
    installed = discover() if installed is None else installed
    rankings = _measured(system, installed) if rankings is None else rankings
    hooks = load_hooks()
    boards = {phase: survey(config, phase, system, installed, build_refusals) for phase in phases}
    named = _named(asked, boards, installed)
    choices = {
        phase: _fallen_back(boards[phase], named[phase], installed, fallback)
        if phase in named and not boards[phase].decision(named[phase]).accepted
        else _direct(boards[phase], named[phase])
        if phase in named
        else _ranked(boards[phase], hooks, rankings)
        for phase in phases
    }
    joint = choose(config, choices)
    resolved = config.replace(page_size=joint.page_size, kv_layout=joint.layout)
    chosen = {phase: _phase_plan(resolved, system, phase, choice) for phase, choice in joint.choices.items()}
    _announce(chosen.values(), fallback, hooks)
    return Plan(
        config=resolved,
        system=system,
        phases=chosen,
        trace={phase: boards[phase].trace(choices[phase], joint) for phase in phases},
        notes=(*filter(None, [system.note]), *installed.notes, *hooks.problems),
    )


def parse_backend(backend: str | Mapping[Phase, str]) -> dict[Phase, str]:
    """The backend asked for in each phase; phases that are ``auto`` are left out.

    Raises UsageError for what is neither ``auto``, nor a name, nor ``phase=name`` for phases that exist, once each.
    """
    if isinstance(backend, str):
        text = backend.strip()
        if "=" not in text:
            pairs = [(phase, text) for phase in PHASES]
        else:
            pairs = [cast(tuple[Phase, str], tuple(part.partition("=")[::2])) for part in text.split(",")]
    elif isinstance(backend, Mapping):
        pairs = list(backend.items())
    else:
        raise UsageError(f"backend {backend!r}", given=backend, accepted="'auto', a name, or a mapping of phases")
    asked: dict[Phase, str] = {}
    for key, value in pairs:
        phase, name = cast(Phase, str(key).strip()), str(value).strip()
        if phase not in PHASES:
            near = nearest(phase, PHASES)
            raise UsageError(f"backend {backend!r}: {phase!r} is no phase", given=backend, accepted=PHASES,
                             hint=f"did you mean {near!r}?" if near else None)  # fmt: skip
        if not name or "," in name or phase in asked:
            raise UsageError(f"backend {backend!r} is malformed at {phase}", given=backend,
                             accepted="'auto', a name, or phase=name with commas between, each phase once")  # fmt: skip
        asked[phase] = name
    return {phase: name for phase, name in asked.items() if name != AUTO}


def _named(asked: Mapping[Phase, str], boards: Mapping[Phase, Board], installed: Installed) -> dict[Phase, BackendRef]:
    """The named backends; all are looked at before any fallback, so that the root cause is what is raised."""
    named = {phase: _find(asked[phase], installed) for phase in boards if phase in asked}
    for phase, ref in named.items():
        decision = boards[phase].decision(ref)
        by_design = phase not in ref.manifest.phases and all(r.layer in ("static", "dynamic") for r in decision.reasons)
        if not decision.accepted and not by_design:
            raise _refused(ref, decision)
    return named


def _find(name: str, installed: Installed) -> BackendRef:
    try:
        return installed.find(name)
    except UnknownBackendError as error:
        dist = preferences().distributions.get(name.partition("@")[0])
        if dist is None:
            raise
        raise UnknownBackendError(
            f"backend {name!r} is not installed", given=name, accepted=error.accepted, hint=f"pip install {dist}"
        ) from None


def _refused(ref: BackendRef, decision: Decision) -> BackendRefusedError | ProtocolError:
    root = decision.reasons[0]
    type_ = ProtocolError if root.code == "protocol_mismatch" else BackendRefusedError
    return type_(
        f"backend {ref.listed!r} cannot run {decision.phase}",
        given=ref.listed,
        trace=[f"  {reason}" for reason in decision.reasons],
        hint="attn explain shows what else could; --attention-backend auto chooses it",
    )


def _direct(board: Board, ref: BackendRef) -> list[Choice]:
    return [Choice(ref, board.decision(ref), NAMED)]


def _fallen_back(board: Board, ref: BackendRef, installed: Installed, policy: FallbackPolicy) -> list[Choice]:
    choices = fallback_choices(board, ref, installed)
    if not choices or policy == "error":
        names = ref.manifest.fallback.get(board.phase, ())
        raise BackendRefusedError(
            f"backend {ref.listed!r} has no {board.phase}"
            + ("" if policy == "error" and choices else ", and nothing of its fallback list can run it"),
            given=ref.listed,
            accepted=f"its fallbacks for {board.phase}: {', '.join(names) or 'none'}",
            trace=[f"  {line}" for line in (*board.decision(ref).reasons, *board.fallback_lines())],
            hint=f"name a backend for {board.phase}" + (", or allow the fallback" if choices else ""),
        )
    return choices


def _measured(system: System, installed: Installed) -> Rankings:
    versions = {ref.listed: ref.version for ref in installed.backends}
    return rankings_from(load_timings(tuned_path(system)), versions)


def _ranked(board: Board, hooks: Hooks, rankings: Rankings) -> list[Choice]:
    usable = board.usable()
    if not usable:
        raise NoBackendError(
            f"no backend can run {board.phase} of {board.config.model or 'this config'} on {board.system}",
            trace=[f"  {candidate}" for candidate in board.rows()],
            hint="attn list-backends shows what is installed, attn doctor what to install",
        )
    order = rank(board.config, board.phase, board.system, [(ref.listed, ref.name) for ref in usable], hooks, rankings)
    refs = {ref.listed: ref for ref in usable}
    return [Choice(refs[listed], board.decision(refs[listed]), why) for listed, why in order]


def _phase_plan(config: AttentionConfig, system: System, phase: Phase, choice: Choice) -> PhasePlan:
    decision = evaluate(choice.ref.manifest, config, phase, system)
    assert decision.accepted, (choice.ref.listed, phase, decision.reasons)
    assert config.page_size is not None
    assert decision.native_page_size is not None
    return PhasePlan(phase, choice.ref, decision, config.page_size, decision.native_page_size, choice.why, choice.chain)


def _announce(chosen: Any, policy: FallbackPolicy, hooks: Hooks) -> None:
    for phase in chosen:
        if phase.fallback:
            event = FallbackEvent(phase.phase, phase.fallback[0], phase.backend.listed, phase.fallback)
            hooks.fallback(event)
            if policy == "warn":
                warnings.warn(str(event), FallbackWarning, stacklevel=3)
