"""`verify`: every case of a tier on one backend, in this process or in several, with progress, a table and evidence.

Needs neither pytest nor hypothesis, but for the fuzzing of the tier ``stress``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from attn_core.errors import BackendRefusedError, UsageError
from attn_core.planning.discovery import IN_PROCESS, BackendRef, discover
from attn_core.planning.reasons import availability
from attn_core.runtime.loading import load_backend
from attn_core.testing import evidence
from attn_core.testing.agenda import PROBES, Agenda, Done, agenda
from attn_core.testing.axes import TIERS, Tier
from attn_core.testing.blame import Blame
from attn_core.testing.cases import Case
from attn_core.testing.devices import Place, at, own_emulators
from attn_core.testing.fuzz import Share
from attn_core.testing.report import Report, junit_xml
from attn_core.testing.rows import rows_of
from attn_core.testing.run import NOT_BEGUN, NOT_ENDED, Result, Target
from attn_core.testing.underclaims import features_to_probe, probes
from attn_core.testing.workers import HANGS_AFTER, Crew, Job, Look, LostDeviceError, Results, in_processes, run_job

Progress = Callable[[int, int, Result], None]

#: Wrong cases that are looked at more closely.
_LOOKS: Final = 8


def verify(
    name: str,
    tier: Tier = "contract",
    device: str = "cpu",
    *,
    seed: int = 0,
    case: str | None = None,
    select: str = "",
    max_cases: int | None = None,
    max_seconds: float | None = None,
    max_failures: int | None = None,
    probe: bool | None = None,
    junit: str | Path | None = None,
    evidence_dir: str | Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Runs the conformance kit on the installed backend ``name`` and reports, feature by feature.

    device: ``cpu``, ``cuda``, ``npu``, ``xpu`` or ``emulated:NAME``. case: an id, to run that one alone. select: only
    cases whose id has this text, and no fuzzing. max_cases: a spread of at most so many positive cases. max_seconds:
    what has not begun by then is not run, and the report says how much of what that is; max_failures: the same when so
    many have failed. probe: whether undeclared
    features are tried all the same (default: on a CPU, where a wrong kernel cannot take the device down). workers:
    processes, which can be replaced if the backend takes one down; 0 runs in this one (never on an accelerator).
    junit, evidence_dir: what to write; evidence is only written of whole tiers, or what time there was for. progress:
    called after each case.

    Raises UnknownBackendError (or AmbiguousBackendError, PluginError) for ``name``, UsageError for the device, the tier
    or a case id, BackendRefusedError if no clause of the backend is for the device or its libraries are not there,
    PluginLoadError if the backend, or the emulator, cannot be loaded.
    """
    if tier not in TIERS:
        raise UsageError(f"tier {tier!r}", given=tier, accepted=TIERS)
    if evidence_dir is not None and (case is not None or select or max_cases is not None):
        raise UsageError("evidence of a part of the cases", hint="leave out case, select and max_cases")
    ref = discover().find(name)
    device, notes = _stand_in(ref, device)
    begun = time.time()
    with at(device) as place:
        check_usable(ref, place)
        plan = (
            Agenda({Case.parse(case): tier})
            if case is not None
            else agenda(
                ref.manifest,
                tier,
                place.system,
                seed,
                select=select,
                max_cases=max_cases or place.max_cases,
                emulated=place.level != "silicon",
            )
        )
        run = _Run(
            ref,
            place,
            # other processes do not have what was registered in this one
            0 if ref.dist == IN_PROCESS else max(workers, int(place.device.type != "cpu")),
            device == "cpu" if probe is None else probe,
            None if max_seconds is None else begun + max_seconds,
            max_failures,
            progress,
        )
        results, done = run.all(plan, tier, seed)
        facts = evidence.facts(ref, place)
        rows, blames = rows_of(
            ref.manifest,
            place.system,
            results,
            eager_graphs=place.device.type == "cpu",
            required=plan.required,
        )
        looked = run.looked_at(blames)
        blames = tuple(replace(blame, first=looked.get(blame.first.case, blame.first)) for blame in blames)
        results = [looked.get(result.case, result) for result in results]
        report = Report(
            ref.name, place.text, place.level, tier, seed, tuple(results), rows, blames, time.time() - begun, facts,
            notes, done,
        )  # fmt: skip
    if junit is not None:
        Path(junit).write_text(junit_xml(report) + "\n", encoding="utf-8")
    if evidence_dir is not None and report.count("passed") + report.count("failed"):
        evidence.write_evidence(evidence_dir, evidence.to_json(report))
    return report


def _stand_in(ref: BackendRef, device: str) -> tuple[str, tuple[str, ...]]:
    """The device, and what to say of it: a backend without a clause for a CPU may have an emulator to run it on one."""
    own = own_emulators(ref)
    devices = {name for clause in ref.manifest.clauses for name in clause.devices}
    if device != "cpu" or devices & {"cpu", "any"} or len(own) != 1:
        return device, ()
    return own[0], (f"{ref.listed} has no clause for a CPU: it ran on {own[0]}, which its distribution provides",)


def check_usable(ref: BackendRef, place: Place) -> None:
    """Refuse at once what cannot run here at all, rather than fail every case for it."""
    reasons = availability(ref.manifest, place.system)
    if reasons:
        others = own_emulators(ref)
        raise BackendRefusedError(
            f"backend {ref.listed!r} cannot be verified on {place.text}",
            given=ref.listed,
            trace=[f"  {reason}" for reason in reasons],
            hint=" or ".join(f"--device {name}" for name in others)
            or "attn doctor shows what is missing; an emulator of yours can stand in for hardware (attn.emulators)",
        )


class _Run:
    """One run on one place: jobs become results, in this process or in others, until the time is over."""

    def __init__(
        self, ref: BackendRef, place: Place, workers: int, probe: bool, deadline: float | None,
        max_failures: int | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.ref, self.place, self.workers, self.probe = ref, place, workers, probe
        self.deadline, self.max_failures, self.progress = deadline, max_failures, progress
        self._count = self._failed = 0

    def all(self, plan: Agenda, tier: Tier, seed: int) -> tuple[list[Result], dict[str, Done]]:
        """The results of everything on the agenda, and of what it shows to be worth probing; and how much ran."""
        results, done = self._results(plan, plan.size)
        features = features_to_probe(results) if self.probe else []
        more = probes(self.ref.manifest, features, tier, self.place.system, seed)
        if not more:
            return results, done
        probing = Agenda(dict.fromkeys(more, PROBES))
        probed, probes_done = self._results(probing, plan.size + probing.size)
        return results + probed, done | probes_done

    def _results(self, plan: Agenda, total: int) -> tuple[list[Result], dict[str, Done]]:
        """The results of the cases in the order of the agenda, then of the fuzzing."""
        of_case: dict[Case, Result] = {}
        fuzzed: list[Result] = []
        cut = "out of time"
        try:
            for job, results in self._stream(plan):
                if isinstance(job, Share):
                    fuzzed += results
                elif isinstance(job, Case):
                    (of_case[job],) = results
                for result in results:
                    self._count += 1
                    self._failed += result.status == "failed"
                    if self.progress is not None:
                        self.progress(self._count, total, result)
                if self.max_failures is not None and self._failed >= self.max_failures:
                    cut = f"{self._failed} cases had failed"
                    break
        except LostDeviceError as error:
            cut = str(error)
        every = [of_case.get(case) or Result(case, "not_run", note=f"{NOT_BEGUN}: {cut}") for case in plan.cases]
        ended = {case for case, result in of_case.items() if not result.note.startswith((NOT_BEGUN, NOT_ENDED))}
        return [*every, *fuzzed], plan.done(ended, len(fuzzed))

    def looked_at(self, blames: Sequence[Blame]) -> dict[Case, Result]:
        """The first cases of wrong outputs once more, with the mistakes that they show; those that fail again."""
        jobs = [Look(blame.first.case) for blame in blames if blame.check in ("output", "lse")][:_LOOKS]
        try:
            every = [result for _, results in self._run(iter(jobs), len(jobs)) for result in results]
        except LostDeviceError:
            return {}
        return {result.case: result for result in every if result.status == "failed"}

    def _run(self, jobs: Iterator[Job], count: int) -> Iterator[tuple[Job, Results]]:
        """Jobs and results as they come."""
        workers = min(self.workers, count)
        return in_processes(jobs, self._crew(workers)) if workers else self._in_this_process(jobs)

    def _stream(self, plan: Agenda) -> Iterator[tuple[Job, Results]]:
        """Jobs and results as they come; the first failure of the fuzzing ends the fuzzing."""
        jobs = _Jobs(plan)
        for job, results in self._run(jobs, plan.size):
            if isinstance(job, Share) and any(result.status == "failed" for result in results):
                jobs.fuzzes = False
            yield job, results

    def _in_this_process(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Results]]:
        target = Target(self.ref, self.place.system, self.place.device)
        load_backend(self.ref)  # once and for all: every case would fail of it
        for job in jobs:
            if self.deadline is not None and time.time() > self.deadline:
                return
            yield job, run_job(job, target, probe=self.probe, deadline=self.deadline)

    def _crew(self, workers: int) -> Crew:
        hangs_after = None if self.place.device.type == "cpu" else HANGS_AFTER
        return Crew(self.ref.listed, self.place.text, workers, self.probe, self.deadline, hangs_after)


class _Jobs(Iterator[Job]):
    """The jobs of an agenda, one at a time; without those of the fuzzing once it has ``fuzzes`` no more."""

    def __init__(self, plan: Agenda) -> None:
        self.fuzzes = True
        self._jobs = plan.jobs()

    def __next__(self) -> Job:
        job = next(self._jobs)
        while isinstance(job, Share) and not self.fuzzes:
            job = next(self._jobs)
        return job
