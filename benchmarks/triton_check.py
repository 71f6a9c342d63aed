"""attn-triton on a GPU, checked: the conformance kit with its evidence, and random steps of every kind against the
oracle.

python benchmarks/triton_check.py verify --tier contract --out FOLDER --workers 14 --budget 150
python benchmarks/triton_check.py random --seeds 0:400 --workers 14 --budget 60
compute-sanitizer --tool racecheck python benchmarks/triton_check.py random --seeds 0:6 --workers 0
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins/attn-triton/tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "random"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tier", default="contract")
    parser.add_argument("--seeds", default="0:100")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument(
        "--budget", type=float, default=100.0, help="Seconds; what is not done by then is said to be not done."
    )
    parser.add_argument("--max-cases", type=int)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    sys.exit(verify(given) if given.what == "verify" else random_steps(given))


def verify(given: argparse.Namespace) -> int:
    """The kit, then once more each case that met a device that an earlier case had broken, in a process of its own."""
    from attn_core.testing.run import Result
    from attn_core.testing.runner import verify as run

    begun, bad, lost = time.monotonic(), [], []

    def progress(done: int, total: int, result: Result) -> None:
        if result.status == "failed" and "CUDA error" in str(result.faults):
            lost.append(result.case.id)
        elif result.status == "failed":
            bad.append({"case": result.case.id, "faults": [str(fault)[:600] for fault in result.faults[:3]]})
            if len(bad) <= 25:
                print(f"FAILED {result.case.id}\n    {str(result.faults[0])[:500]}", flush=True)
        if done % 200 == 0 or done == total:
            print(f"{given.tier} {done}/{total}, {len(bad)} failed, {len(lost)} lost, {time.monotonic() - begun:.0f} s", flush=True)

    report = run(
        "triton", given.tier, "cuda", workers=given.workers, progress=progress, max_cases=given.max_cases,
        evidence_dir=given.out / "evidence" if given.max_cases is None else None,
    )  # fmt: skip
    for row in report.rows:
        print(f"{row.name:24s} {row.outcome:14s} {row.passed} passed, {row.failed} failed {row.note}", flush=True)
    bad += alone(lost, given.workers, given.budget - (time.monotonic() - begun))
    (given.out / "verify-failures.json").write_text(json.dumps(bad, indent=1))
    return int(bool(bad))


def alone(cases: list[str], workers: int, budget: float) -> list[dict[str, object]]:
    """What is wrong with each of these cases when nothing ran before it in its process."""
    bad: list[dict[str, object]] = []
    if not cases or budget <= 0:
        return [{"case": case, "faults": ["not run alone"]} for case in cases]
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1)
    waiting = {pool.submit(one_case, case): case for case in cases}
    done = 0
    try:
        for future in as_completed(waiting, timeout=budget):
            done += 1
            if future.result():
                bad.append({"case": waiting[future], "faults": future.result()})
                print(f"FAILED alone {waiting[future]}\n    {future.result()[0][:400]}", flush=True)
    except TimeoutError:
        print(f"{len(cases) - done} cases not run alone", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{done} cases run alone, {len(bad)} failed", flush=True)
    return bad


def one_case(case: str) -> list[str]:
    from attn_core.testing.runner import verify as run

    return [str(fault)[:600] for result in run("triton", "contract", "cuda", case=case).results for fault in result.faults]


def random_steps(given: argparse.Namespace) -> int:
    first, last = map(int, given.seeds.split(":"))
    begun, done, bad = time.monotonic(), 0, 0
    if not given.workers:
        for seed in range(first, last):
            found = one(seed)
            print(seed, found or "ok", flush=True)
            bad += found is not None
        return int(bool(bad))
    pool = ProcessPoolExecutor(given.workers, mp_context=get_context("spawn"))
    waiting = [pool.submit(one, seed) for seed in range(first, last)]
    try:
        for future in as_completed(waiting, timeout=given.budget):
            found = future.result()
            done += 1
            if found is not None:
                bad += 1
                print(found, flush=True)
    except TimeoutError:
        print(f"{last - first - done} not done in {given.budget:.0f} s", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"random steps: {done} done, {bad} wrong, {time.monotonic() - begun:.0f} s", flush=True)
    return int(bool(bad))


def one(seed: int) -> str | None:
    """What is wrong with a random step on the GPU, or what it raised."""
    torch.set_num_threads(1)
    from random_cases import GPU_SCALE, fault, make_scene

    try:
        return fault(make_scene(seed, "cuda", GPU_SCALE))
    except Exception:
        return f"seed {seed} raised {traceback.format_exc(limit=-4)}"


if __name__ == "__main__":
    main()
