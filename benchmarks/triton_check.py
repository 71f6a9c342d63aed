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
    from attn_core.testing.run import Result
    from attn_core.testing.runner import verify as run

    begun, bad = time.monotonic(), []

    def progress(done: int, total: int, result: Result) -> None:
        if result.status == "failed":
            bad.append({"case": result.case.id, "faults": [str(fault)[:600] for fault in result.faults[:3]]})
            if len(bad) <= 25:
                print(f"FAILED {result.case.id}\n    {str(result.faults[0])[:500]}", flush=True)
            (given.out / "verify-failures.json").write_text(json.dumps(bad, indent=1))
        if done % 100 == 0 or done == total:
            print(f"{given.tier} {done}/{total}, {len(bad)} failed, {time.monotonic() - begun:.0f} s", flush=True)

    report = run(
        "triton", given.tier, "cuda", workers=given.workers, progress=progress, max_cases=given.max_cases,
        evidence_dir=given.out / "evidence" if given.max_cases is None else None,
    )  # fmt: skip
    for row in report.rows:
        print(f"{row.name:24s} {row.outcome:14s} {row.passed} passed, {row.failed} failed {row.note}", flush=True)
    return int(bool(bad))


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
