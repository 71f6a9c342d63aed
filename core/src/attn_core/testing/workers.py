"""Cases in processes that can be replaced: what crashes, hangs or breaks its device ends one of them, not the run."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final

import torch

from attn_core.errors import AttnError
from attn_core.planning.discovery import discover
from attn_core.runtime.loading import load_backend
from attn_core.testing.cases import Case
from attn_core.testing.checks import Fault
from attn_core.testing.devices import at
from attn_core.testing.fuzz import Share, run_share
from attn_core.testing.refusals import check_refusal
from attn_core.testing.run import NOT_ENDED, Result, Target, run_case


@dataclass(frozen=True, slots=True)
class Look:
    """A case that failed, once more, to find the mistake that it shows."""

    case: Case


#: What a process is given to do: one case, a share of the fuzzing, or a closer look.
Job = Case | Share | Look
Results = tuple[Result, ...]

#: What torch says when an earlier kernel has broken the device's context: nothing can run in this process any more.
_LOST_DEVICE: Final = ("CUDA error", "device-side assert", "unspecified launch failure", "NPU function error")
_PROFILER_LOG: Final = "KINETO_LOG_LEVEL"
#: Seconds after which a case on an accelerator hangs: it may compile a library's kernels first, which takes minutes.
HANGS_AFTER: Final = 900.0
#: Seconds that running cases have to end in when the time of a run is over.
GRACE: Final = 15.0
#: Processes that may be lost to a device that is broken for good, before what is left is given up.
MAX_LOST: Final = 40


@dataclass(frozen=True, slots=True)
class Crew:
    """How many processes, on what, and for how long.

    name, device, probe: as for `verify`. deadline: in the time of ``time.time()``, None for as long as it takes.
    hangs_after: seconds for one case, None where a case may take any time (emulators).
    """

    name: str
    device: str
    workers: int
    probe: bool
    deadline: float | None = None
    hangs_after: float | None = None


def run_job(
    job: Job, target: Target, *, probe: bool, deadline: float | None, begins: Callable[[Case], None] | None = None
) -> Results:
    """A case of either direction, a closer look at one, or a share of fuzzing.

    ``begins`` is told of each case of a share before it runs.
    """
    if isinstance(job, Share):
        return run_share(job, target, deadline=deadline, begins=begins, is_lost=lost_device)
    if isinstance(job, Look):
        return (_run_case(job.case, target, probe=False, look=True),)
    return (_run_case(job, target, probe=probe, look=False),)


def _run_case(case: Case, target: Target, *, probe: bool, look: bool) -> Result:
    """A case, whatever happens in it, with what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            result = check_refusal(case, target, probe=probe) if case.refused else run_case(case, target, look=look)
        except Exception as error:
            result = Result(case, "failed", (Fault("raised", f"{type(error).__name__}: {error}"),))
    said = dict.fromkeys(f"{warning.category.__name__}: {warning.message}" for warning in caught)
    return replace(result, warnings=tuple(said)) if said else result


def lost_device(result: Result) -> bool:
    """Whether the case broke the device for what would come after it."""
    return any(sign in fault.message for fault in result.faults for sign in _LOST_DEVICE)


class LostDeviceError(AttnError):
    """Processes are lost one after the other: the device is broken for good."""


def in_processes(jobs: Iterator[Job], crew: Crew) -> Iterator[tuple[Job, Results]]:
    """Each job with its results, as they come; of those that the deadline cut off, only cases, as not run.

    A job is taken when a process is free for it. A process that died, hung or lost its device is replaced, and its job
    has a failed result that says so. Raises AttnError if processes cannot be started, PluginLoadError if the backend
    cannot be loaded, LostDeviceError if too many are lost.
    """
    upcoming, lost = next(jobs, None), 0
    staff: list[_Process] = []
    try:
        while upcoming is not None or any(process.job is not None for process in staff):
            if crew.deadline is not None and time.time() > crew.deadline:
                upcoming = None
            if crew.deadline is not None and time.time() > crew.deadline + GRACE:
                yield from (cut for process in staff if (cut := process.cut_off()) is not None)
                break
            while upcoming is not None and len(staff) < crew.workers:
                staff.append(_Process(crew))
            for process in _ready(staff, crew):
                ended = process.listen()
                if ended is not None:
                    yield ended
                lost += process.is_lost
                if process.is_idle and not process.is_lost and upcoming is not None:
                    process.give(upcoming)
                    upcoming = next(jobs, None)
                if process.is_idle or process.is_lost:
                    process.end()
                    staff.remove(process)
            if lost > MAX_LOST:
                raise LostDeviceError(f"{lost} processes were lost to {crew.name} on {crew.device}")
    finally:
        for process in staff:
            process.end()


def _ready(staff: list[_Process], crew: Crew) -> list[_Process]:
    """The processes that have something to say, are gone, or have been silent for too long."""
    by_connection = {process.connection: process for process in staff}
    heard = [by_connection[connection] for connection in wait(list(by_connection), timeout=1.0)]  # type: ignore[index]
    if crew.hangs_after is None:
        return heard
    return heard + [
        p for p in staff if p.job is not None and p not in heard and time.time() - p.heard > crew.hangs_after
    ]


class _Process:
    """One worker: what it does, and when it was last heard of."""

    def __init__(self, crew: Crew) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(theirs, crew), daemon=True)
        with _quiet_profiler():
            self._process.start()
        theirs.close()
        self.job: Job | None = None
        self.heard = time.time()
        self.is_lost = False
        self._case: Case | None = None
        self._has_started = False

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a job."""
        return self._has_started and self.job is None

    def give(self, job: Job) -> None:
        """Begin a job."""
        self.job = job
        self._case = None if isinstance(job, Share) else job.case if isinstance(job, Look) else job
        self.heard = time.time()
        self.connection.send(job)

    def listen(self) -> tuple[Job, Results] | None:
        """Hear what it says, or that it says no more; the job that has ended with its results.

        Raises AttnError if the process could not start.
        """
        if not self.connection.poll():
            return self._lose(f"it did not end within {time.time() - self.heard:.0f} seconds")
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return self._lose("the process died")
        self.heard = time.time()
        match message:
            case ("started", None):
                self._has_started = True
            case ("unusable", AttnError() as error):
                raise error
            case ("broken", text):
                raise AttnError(f"a process for the cases could not start: {text}")
            case ("begins", case):
                self._case = case
            case ("ended", results):
                assert self.job is not None, "results of no job"
                job, self.job = self.job, None
                self.is_lost = any(map(lost_device, results))
                return job, results
        return None

    def cut_off(self) -> tuple[Job, Results] | None:
        """The case that it runs, if it runs one, as one that did not end in time: slow, or hanging."""
        job, self.job = self.job, None
        if not isinstance(job, Case):
            return None
        note = f"{NOT_ENDED} after {time.time() - self.heard:.0f} seconds, when the time was over: {job.id}"
        self.is_lost = True
        return job, (Result(job, "not_run", note=note),)

    def _lose(self, why: str) -> tuple[Job, Results] | None:
        """Take note that the process is gone or hangs: the case that it ran has failed."""
        self._process.join(1.0)
        code = self._process.exitcode
        why = why if code is None else f"{why}, with exit code {code}"
        if not self._has_started:
            raise AttnError(f"a process for the cases could not start: {why}")
        self.is_lost = True
        job, self.job = self.job, None
        if job is None:
            return None
        failed = () if self._case is None else (Result(self._case, "failed", (Fault("raised", why),)),)
        return job, failed

    def end(self) -> None:
        """Let go of it, by force if it is busy."""
        if self.is_idle and not self.is_lost:
            with suppress(OSError):
                self.connection.send(None)
            self._process.join(GRACE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(GRACE)
        self.connection.close()


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """For what starts in the context: torch's profiler, which watches replays, says only what it cannot do."""
    before = os.environ.get(_PROFILER_LOG)
    os.environ.setdefault(_PROFILER_LOG, "3")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROFILER_LOG]


def _work(connection: Connection[Any, Any], crew: Crew) -> None:
    """The life of a worker: jobs from the connection until there is None. Ctrl-C is for whoever started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        try:
            place = stack.enter_context(at(crew.device))
            target = Target(discover().find(crew.name), place.system, place.device)
        except Exception as error:
            connection.send(("broken", f"{type(error).__name__}: {error}"))
            return
        try:
            load_backend(target.ref)
        except AttnError as error:
            connection.send(("unusable", error))
            return
        connection.send(("started", None))
        while (job := connection.recv()) is not None:
            begins = (lambda case: connection.send(("begins", case))) if isinstance(job, Share) else None
            results = run_job(job, target, probe=crew.probe, deadline=crew.deadline, begins=begins)
            connection.send(("ended", results))
