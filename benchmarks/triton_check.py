"""attn-triton on a GPU, checked: the conformance kit with its evidence, and random steps of every kind against the
oracle.

python benchmarks/triton_check.py verify --tier contract --out FOLDER --workers 15 --seconds 50
python benchmarks/triton_check.py cases ID... --out FOLDER
python benchmarks/triton_check.py random --seeds 0:400 --workers 15 --seconds 40
compute-sanitizer --tool racecheck python benchmarks/triton_check.py small
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

J = TypeVar("J")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins/attn-triton/tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "cases", "random", "small"))
    parser.add_argument("ids", nargs="*", help="Cases of the kit.")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tier", default="contract")
    parser.add_argument("--seeds", default="0:100")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=100.0, help="What is not done by then is named.")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run = {"verify": verify, "cases": cases, "random": random_steps, "small": small_steps}[given.what]
    sys.exit(run(given))


def verify(given: argparse.Namespace) -> int:
    """The kit for so many seconds, its evidence, and every failure with the case that shows it."""
    from attn_core.testing.run import Result
    from attn_core.testing.runner import verify as run

    begun, bad = time.monotonic(), []

    def progress(done: int, total: int, result: Result) -> None:
        if result.status == "failed":
            bad.append({"case": result.case.id, "faults": [str(fault)[:600] for fault in result.faults[:3]]})
            if len(bad) <= 25:
                print(f"FAILED {result.case.id}\n    {str(result.faults[0])[:500]}", flush=True)
        if done % 200 == 0:
            print(f"{given.tier} {done}/{total}, {len(bad)} failed, {time.monotonic() - begun:.0f} s", flush=True)

    report = run(
        "triton", given.tier, "cuda", workers=given.workers, progress=progress, max_seconds=given.seconds,
        evidence_dir=given.out / "evidence",
    )  # fmt: skip
    for row in report.rows:
        print(f"{row.name:24s} {row.outcome:14s} {row.passed} passed, {row.failed} failed {row.note}", flush=True)
    counts = Counter(result.status for result in report.results)
    done = {part: list(part_done) for part, part_done in report.done.items()}
    summary = {"counts": counts, "done": done, "seconds": time.monotonic() - begun, "failures": bad}
    (given.out / f"verify-triton-{given.tier}.json").write_text(json.dumps(summary, indent=1))
    print(f"{given.tier}: {dict(counts)}, done {done}, {time.monotonic() - begun:.0f} s", flush=True)
    return int(bool(bad))


def cases(given: argparse.Namespace) -> int:
    """Each case in a process of its own: what breaks the device breaks it for nobody else."""
    return _each(one_case, given.ids, len(given.ids), given.seconds, own_process=True)


def random_steps(given: argparse.Namespace) -> int:
    first, last = map(int, given.seeds.split(":"))
    if given.workers:
        return _each(random_step, range(first, last), given.workers, given.seconds)
    bad = 0
    for seed in range(first, last):
        found = random_step(seed)
        print(seed, found or "ok", flush=True)
        bad += found is not None
    return int(bool(bad))


def small_steps(given: argparse.Namespace) -> int:
    """A small step for every kernel, one after the other: what a sanitizer is to watch."""
    from chosen_steps import STEPS, step_faults  # type: ignore[import-not-found]

    bad = 0
    for name, step in STEPS.items():
        if given.ids and name not in given.ids:
            continue
        found = step_faults(step, "cuda")
        print(f"{name}: {found or 'ok'}", flush=True)
        bad += bool(found)
    return int(bool(bad))


def _each(
    function: Callable[[J], str | None], jobs: Iterable[J], workers: int, seconds: float, *, own_process: bool = False
) -> int:
    """``function`` of all jobs in processes; prints what it says of each that is wrong."""
    begun, done, bad = time.monotonic(), 0, 0
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1 if own_process else None)
    waiting = {pool.submit(function, job): job for job in jobs}
    try:
        for future in as_completed(waiting, timeout=seconds):
            done += 1
            try:
                found = future.result()
            except Exception as error:  # its process was lost
                found = repr(error)
            if found is not None:
                bad += 1
                print(f"WRONG {waiting[future]}\n    {found}", flush=True)
    except TimeoutError:
        print(f"{len(waiting) - done} not done in {seconds:.0f} s", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{function.__name__}: {done} done, {bad} wrong, {time.monotonic() - begun:.0f} s", flush=True)
    return int(bool(bad))


def one_case(case: str) -> str | None:
    """What is wrong with a case of the kit."""
    from attn_core.planning.discovery import discover
    from attn_core.testing.cases import Case
    from attn_core.testing.devices import at
    from attn_core.testing.run import Target, run_case

    torch.set_num_threads(1)
    with at("cuda") as place:
        result = run_case(Case.parse(case), Target(discover().find("triton"), place.system, place.device))
    return (
        None if result.status == "passed" else f"{result.status} {result.note} {[str(f)[:600] for f in result.faults]}"
    )


def random_step(seed: int) -> str | None:
    """What is wrong with a random step on the GPU, or what it raised."""
    torch.set_num_threads(1)
    from random_cases import GPU_SCALE, fault, make_scene  # type: ignore[import-not-found]

    try:
        found: str | None = fault(make_scene(seed, "cuda", GPU_SCALE))
        return found
    except Exception:
        return f"seed {seed} raised {traceback.format_exc(limit=-4)}"


if __name__ == "__main__":
    main()
