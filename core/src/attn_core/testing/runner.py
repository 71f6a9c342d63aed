"""`verify`: every case of a tier on one backend, in this process or in several, with progress, a table and evidence.

Needs neither pytest nor hypothesis, but for the fuzzing of the tier ``stress``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import torch

from attn_core.errors import BackendRefusedError, UsageError
from attn_core.planning.discovery import IN_PROCESS, BackendRef, discover
from attn_core.planning.reasons import availability
from attn_core.testing import evidence
from attn_core.testing.axes import TIERS, Tier
from attn_core.testing.cases import Case
from attn_core.testing.checks import Fault
from attn_core.testing.devices import Place, at, own_emulators
from attn_core.testing.generation import generate_cases, spread
from attn_core.testing.refusals import check_refusal, refusal_cases
from attn_core.testing.report import Report, junit_xml, rows_of
from attn_core.testing.run import Result, Target, run_case

Progress = Callable[[int, int, Result], None]

#: What torch says when an earlier kernel has broken the device's context: nothing can run in this process any more.
_LOST_DEVICE: Final = ("CUDA error", "device-side assert", "unspecified launch failure", "NPU function error")


def verify(
    name: str,
    tier: Tier = "contract",
    device: str = "cpu",
    *,
    seed: int = 0,
    case: str | None = None,
    select: str = "",
    max_cases: int | None = None,
    probe: bool | None = None,
    junit: str | Path | None = None,
    evidence_dir: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Runs the conformance kit on the installed backend ``name`` and reports, feature by feature.

    device: ``cpu``, ``cuda``, ``npu``, ``xpu`` or ``emulated:NAME``. case: an id, to run that one alone. select: only
    cases whose id has this text. max_cases: a spread of at most so many positive cases. probe: whether undeclared
    features are tried all the same (default: on a CPU, where a wrong kernel cannot take the device down). workers:
    processes.
    junit, evidence_dir: what to write; evidence is only written of whole tiers. progress: called after each case.

    Raises UnknownBackendError (or AmbiguousBackendError, PluginError) for ``name``, UsageError for the device, the tier
    or a case id, BackendRefusedError if no clause of the backend is for the device or its libraries are not there.
    """
    if tier not in TIERS:
        raise UsageError(f"tier {tier!r}", given=tier, accepted=TIERS)
    if evidence_dir is not None and (case is not None or select or max_cases is not None):
        raise UsageError("evidence of a part of the cases", hint="leave out case, select and max_cases")
    ref = discover().find(name)
    device, notes = _stand_in(ref, device)
    begun = time.perf_counter()
    with at(device) as place:
        if ref.dist == IN_PROCESS:
            workers = 1  # other processes do not have what was registered in this one
        check_usable(ref, place)
        cases = (
            [Case.parse(case)]
            if case is not None
            else cases_of(ref, place, tier, seed, select, max_cases or place.max_cases)
        )
        probe = device == "cpu" if probe is None else probe
        results = _run(cases, ref, place, workers, probe, progress)
        if tier == "stress" and case is None:
            results += _fuzz(ref, place, seed, progress)
        report = replace(_report(ref, place, tier, seed, results, time.perf_counter() - begun), notes=notes)
    if junit is not None:
        Path(junit).write_text(junit_xml(report) + "\n", encoding="utf-8")
    if evidence_dir is not None:
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
            hint=f"--device {others[0]}" if others else "attn doctor shows what is missing",
        )


def cases_of(
    ref: BackendRef, place: Place, tier: Tier, seed: int, select: str = "", max_cases: int | None = None
) -> list[Case]:
    """The cases of a tier and of those before it, and the refusals; see `verify` for what they are cut by."""
    tiers = TIERS[: TIERS.index(tier) + 1]
    positive = dict.fromkeys(c for t in tiers for c in generate_cases(ref.manifest, t, place.system, seed))
    chosen = [c for c in positive if select in c.id]
    refused = [c for c in refusal_cases(ref.manifest, tier, place.system, seed) if select in c.id]
    if not chosen + refused:
        raise UsageError(f"no case has {select!r} in its id", given=select, hint="leave select out")
    return [*spread(chosen, max_cases), *refused]


def run_any(case: Case, target: Target, *, probe: bool) -> Result:
    """A case of either direction."""
    return check_refusal(case, target, probe=probe) if case.refused else run_case(case, target)


def _run(
    cases: Sequence[Case], ref: BackendRef, place: Place, workers: int, probe: bool, progress: Progress | None
) -> list[Result]:
    results = []
    # a broken kernel takes an accelerator's context along, so its cases run in processes that can be replaced
    accelerated = place.device.type != "cpu" and ref.dist != IN_PROCESS
    if workers > 1 or accelerated:
        stream = _in_processes(cases, ref.listed, place.text, workers, probe)
    else:
        stream = _in_this_process(cases, Target(ref, place.system, place.device), probe)
    for result in stream:
        results.append(result)
        if progress is not None:
            progress(len(results), len(cases), result)
    order = {case: i for i, case in enumerate(cases)}
    return sorted(results, key=lambda result: order[result.case])


def _in_this_process(cases: Iterable[Case], target: Target, probe: bool) -> Iterator[Result]:
    return (run_any(case, target, probe=probe) for case in cases)


def _lost_device(result: Result) -> bool:
    return any(sign in fault.message for fault in result.faults for sign in _LOST_DEVICE)


@dataclass(slots=True)
class _Worker:
    """What a worker process holds between its cases."""

    target: Target
    stack: ExitStack
    probe: bool


_worker: _Worker | None = None


def _start_worker(name: str, device: str, probe: bool) -> None:
    global _worker
    torch.set_num_threads(1)
    stack = ExitStack()
    place = stack.enter_context(at(device))
    _worker = _Worker(Target(discover().find(name), place.system, place.device), stack, probe)


def _work(case_id: str) -> Result:
    assert _worker is not None, "a worker that was not started"
    return run_any(Case.parse(case_id), _worker.target, probe=_worker.probe)


def _in_processes(cases: Sequence[Case], name: str, device: str, workers: int, probe: bool) -> Iterator[Result]:
    """Results as they come. A process that lost its device is replaced; after one that died, cases run one by one."""
    left = dict.fromkeys(cases)
    while left:
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(name, device, probe)
        )
        try:
            for result in _from_pool(pool, list(left), one_by_one=workers == 1):
                del left[result.case]
                yield result
                if _lost_device(result):
                    break
        except _DiedError as died:
            print("a worker process died; the cases that are left run one by one", file=sys.stderr)
            if died.case is not None:
                del left[died.case]
                yield Result(died.case, "failed", (Fault("raised", "the process died"),))
            workers = 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _DiedError(Exception):
    """A worker process is gone; ``case`` is what it ran, if that is known."""

    def __init__(self, case: Case | None) -> None:
        super().__init__(case)
        self.case = case


def _from_pool(pool: ProcessPoolExecutor, cases: Sequence[Case], *, one_by_one: bool) -> Iterator[Result]:
    if one_by_one:
        for case in cases:
            try:
                yield pool.submit(_work, case.id).result()
            except BrokenProcessPool:
                raise _DiedError(case) from None
        return
    try:
        pending: set[Future[Result]] = {pool.submit(_work, case.id) for case in cases}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise _DiedError(None) from None


def _fuzz(ref: BackendRef, place: Place, seed: int, progress: Progress | None) -> list[Result]:
    from attn_core.testing.fuzz import fuzz

    found = fuzz(Target(ref, place.system, place.device), seed=seed, progress=progress)
    return list(found.results)


def _report(ref: BackendRef, place: Place, tier: Tier, seed: int, results: Sequence[Result], seconds: float) -> Report:
    rows, blames = rows_of(ref.manifest, place.system, results, eager_graphs=place.device.type == "cpu")
    facts = evidence.facts(ref, place)
    return Report(ref.name, place.text, place.level, tier, seed, tuple(results), rows, blames, seconds, facts)


def print_progress(done: int, total: int, result: Result) -> None:
    """A line on stderr for each failure, and one that is rewritten for the count."""
    if result.status == "failed":
        print(f"\rFAILED {result.case.id}\n  {result.faults[0]}", file=sys.stderr)
    end = "\n" if done == total else ""
    print(f"\r{done}/{total}", end=end, file=sys.stderr, flush=True)
