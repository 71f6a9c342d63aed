"""One case on one backend: planned, built, witnessed, run, poisoned, and compared with the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from attn_core.errors import AttnError, BackendRefusedError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.discovery import BackendRef, Installed
from attn_core.planning.plan import Plan, plan
from attn_core.planning.system import System
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.witness import Witness
from attn_core.testing.cases import Case
from attn_core.testing.checks import (
    Fault,
    InputGuard,
    Output,
    differing,
    form_faults,
    output_faults,
    snapshot,
    write_faults,
)
from attn_core.testing.far import room_for
from attn_core.testing.reference import problems
from attn_core.testing.scene import Inputs, Scene, Step
from attn_core.testing.tolerances import Precision, expect

Status = Literal["passed", "failed", "not_run"]
#: How the note of a case begins that a run had no time for, or no memory.
NOT_BEGUN: Final = "not begun"
#: How the note of a case begins that ran when the time of a run was over.
NOT_ENDED: Final = "not ended"


def _unranked(config: AttentionConfig, phase: Phase, system: System) -> dict[str, float]:
    """No measured times: the kit names its backend."""
    return {}


@dataclass(frozen=True, slots=True)
class Target:
    """The backend under test, and where it runs. Nothing else is installed as far as its plans are concerned."""

    ref: BackendRef
    system: System
    device: torch.device

    @property
    def installed(self) -> Installed:
        return Installed(backends=(self.ref,))

    def plan(self, case: Case) -> Plan:
        """The case planned for this backend alone, in the phases of the case. Raises what planning raises."""
        return plan(
            case.config(),
            self.ref.listed,
            system=self.system,
            installed=self.installed,
            fallback="error",
            rankings=_unranked,
            phases=case.phases,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """How a case ended. ``note`` says why it was not run, or what else is worth knowing."""

    case: Case
    status: Status
    faults: tuple[Fault, ...] = ()
    note: str = ""
    seconds: float = 0.0
    #: an undeclared case that was refused as it must be, and gives right answers when it is asked all the same
    works_undeclared: bool = False
    #: what was warned of while it ran, each once
    warnings: tuple[str, ...] = ()


def run_case(case: Case, target: Target, *, look: bool = False) -> Result:
    """A positive case: it must be planned, built, and right in everything that `checks` looks at.

    ``look``: a wrong output is compared with what known mistakes would give, which takes many times as long.
    """
    if not case.far:
        return _run_case(case, target, look)
    with room_for(case, target.device) as lacking:
        return Result(case, "not_run", note=f"{NOT_BEGUN}: {lacking}") if lacking else _run_case(case, target, look)


def _run_case(case: Case, target: Target, look: bool) -> Result:
    begun = time.perf_counter()

    def ended(status: Status, faults: list[Fault], note: str = "") -> Result:
        return Result(case, status, tuple(faults), note, time.perf_counter() - begun)

    try:
        planned = target.plan(case)
    except AttnError as error:
        return ended("failed", [Fault("refused", _first_lines(error))])
    try:
        trial = Trial(case, target, planned, look=look)
    except BackendRefusedError as error:
        return ended("not_run", [], f"the installed build refuses: {_reasons(error)}")
    except Exception as error:
        return ended("failed", [Fault("raised", f"while it was built: {_described(error)}")])
    with trial.witness:
        faults = trial.faults()
    return ended("failed" if faults else "passed", faults)


class Trial:
    """A built backend with its cache, and the scene it plays."""

    def __init__(self, case: Case, target: Target, planned: Plan, *, look: bool = False) -> None:
        self.case, self.target, self.plan, self.look = case, target, planned, look
        self.scene = Scene(case, planned.config, target.device)
        self.cache: KVCache = self.scene.allocate()
        self.backend: AttentionBackend = build(planned, self.cache, installed=target.installed)
        self.witness = Witness(self.backend)
        self.precision = Precision.of(self.scene.dtype, quantizes_query=self._quantizes_query())

    def _quantizes_query(self) -> bool:
        """Whether the clause that takes the case says that an fp8 cache makes it quantise queries."""
        if self.case.kv_dtype == "auto":
            return False
        chosen = [
            (p.backend.manifest, i) for p in self.plan.phases.values() for i in p.decision.clauses if i is not None
        ]
        return any(getattr(manifest.clauses[i], "quantizes_query", False) for manifest, i in chosen)

    def faults(self) -> list[Fault]:
        """What is wrong, nothing if all is right. An exception is a fault; what comes after it is not tried."""
        found: list[Fault] = []
        try:
            for check in self._checks():
                found += check()
        except Exception as error:
            found.append(Fault("raised", _described(error)))
        return found + self._witness_faults()

    def _checks(self) -> Iterator[Callable[[], list[Fault]]]:
        if self.case.mode == "ragged":
            from attn_core.testing.ragged import ragged_faults

            yield lambda: ragged_faults(self.witness.backend, self.scene, self.precision)
            return
        if "graph" in self.case.options:
            from attn_core.testing.graphs import graph_faults

            yield lambda: graph_faults(self)
            return
        yield self._run_clean
        yield self._run_poisoned
        if "twice" in self.case.options:
            yield self._run_again
        if "alone" in self.case.options:
            yield self._run_alone

    # -- playing the scene

    def play(self, *, poison: bool = False, each: Callable[[Step, list[Output]], None] | None = None) -> list[Output]:
        """Fill the cache, run every wave, and return the outputs of all forwards in order."""
        self.scene.fill(self.cache, poison=poison)
        outputs: list[Output] = []
        for wave in self.scene.waves:
            ran = self._run_wave(wave)
            for step in wave:
                outputs += ran[id(step)]
                if each is not None:
                    each(step, ran[id(step)])
        return outputs

    def _run_wave(self, wave: list[Step]) -> dict[int, list[Output]]:
        """Prepare every batch of the wave, then run layer by layer, the batches in turn."""
        batches = {id(step): replace(step.batch, plan_state=None) for step in wave}
        for step in wave:
            self._write_first(step)
            self.witness.backend.init_forward_metadata(batches[id(step)])
        outputs: dict[int, list[Output]] = {id(step): [] for step in wave}
        for i in range(len(self.scene.layers)):
            for step in wave:
                outputs[id(step)].append(self.forward(step.inputs[i], batches[id(step)]))
        return outputs

    def _write_first(self, step: Step) -> None:
        for layer in self.scene.layers:
            slots = step.write_first.get(layer.layer_id)
            if slots is not None:
                truth, place = self.scene.truth[layer.layer_id], self.scene.device
                v = None if truth.v is None else truth.v[slots].to(place)
                self.witness.backend.write_kv(
                    truth.k[slots].to(place), v, layer, self.scene.site.slots(slots).to(place)
                )

    def forward(self, inputs: Inputs, batch: ForwardBatch) -> Output:
        """One forward of one layer, asked for what the case asks for."""
        options, layer = self.case.options, inputs.layer
        save = not options & {"nosave", "decoy"}
        wants_lse = "lse" in options
        out = self._own_output(inputs.q, layer.num_q_heads, layer.v_head_dim) if "out" in options else None
        result = self.witness.backend.forward(
            inputs.q, inputs.k, inputs.v, layer, batch, save_kv_cache=save, return_lse=wants_lse, out=out
        )
        given, lse = result if isinstance(result, tuple) else (result, None)
        if out is not None and given.data_ptr() != out.data_ptr():
            raise AssertionError("out= was given, and another tensor came back")
        return Output.on_host(given, lse)

    def _own_output(self, q: Tensor, heads: int, width: int) -> Tensor:
        return torch.full((q.shape[0], heads, width), float("nan"), dtype=q.dtype, device=q.device)

    # -- the checks

    def _run_clean(self) -> list[Fault]:
        found: list[Fault] = []
        self.scene.fill(self.cache, poison=False)
        before = snapshot(self.scene, self.cache)
        guards = [InputGuard(step) for wave in self.scene.waves for step in wave]
        self.clean = self.play(each=lambda step, outputs: found.extend(self._compare(step, outputs)))
        found += write_faults(self.scene, self.cache, before, (step for wave in self.scene.waves for step in wave))
        return found + [fault for guard in guards for fault in guard.faults()]

    def _compare(self, step: Step, outputs: list[Output]) -> list[Fault]:
        found = []
        for inputs, output in zip(step.inputs, outputs, strict=True):
            layer, q = inputs.layer, inputs.q
            shape = (q.shape[0], layer.num_q_heads, layer.v_head_dim)
            wrong_form = form_faults(output, shape, q.dtype, "lse" in self.case.options)
            found += wrong_form
            if not wrong_form:
                expected = expect(problems(q, layer, step.batch, self.cache), q, layer, self.precision)
                found += self._likened(output_faults(output, expected, f"layer {layer.layer_id}"), output, inputs, step)
        return found

    def _likened(self, faults: list[Fault], output: Output, inputs: Inputs, step: Step) -> list[Fault]:
        """The faults of an output, the first of them with the known mistake that would give it."""
        if not faults or not self.look:
            return faults
        from attn_core.testing.mistakes import likeness

        mistake = likeness(output, inputs, step.batch, self.cache, self.precision)
        first, *rest = faults
        return [replace(first, message=f"{first.message}; it is right for {mistake}") if mistake else first, *rest]

    def _run_poisoned(self) -> list[Fault]:
        """The same with NaN and infinities in every slot that holds no token: not a bit may change."""
        self.scene.fill(self.cache, poison=True)
        before = snapshot(self.scene, self.cache)
        poisoned = self.play(poison=True)
        found = write_faults(self.scene, self.cache, before, (step for wave in self.scene.waves for step in wave))
        where = differing(self.clean, poisoned)
        if where is None:
            return found
        if differing(self.clean, self.play()) is None:
            return [*found, Fault("isolation", where)]
        return found + self._compare_poisoned()

    def _compare_poisoned(self) -> list[Fault]:
        """For a backend whose clean runs differ too: then bits say nothing, and the oracle decides."""
        found: list[Fault] = []
        self.play(poison=True, each=lambda step, outputs: found.extend(self._compare(step, outputs)))
        return [Fault("isolation", str(fault)) for fault in found]

    def _run_again(self) -> list[Fault]:
        for _ in range(2):
            where = differing(self.clean, self.play())
            if where is not None:
                return [Fault("deterministic", where)]
        return []

    def _run_alone(self) -> list[Fault]:
        from attn_core.testing.alone import alone_faults

        return alone_faults(self)

    def _witness_faults(self) -> list[Fault]:
        others = sorted(set(self.witness.names) - {self.target.ref.name})
        return [Fault("witness", f"{', '.join(others)} instead of {self.target.ref.name}")] if others else []


def _reasons(error: AttnError) -> str:
    """The reasons of a refusal, each once."""
    return "; ".join(dict.fromkeys(line.strip() for line in error.trace)) or _first_lines(error)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_lines(error)}"


def _first_lines(error: BaseException) -> str:
    return " | ".join(str(error).strip().splitlines()[:4])[:400]
