"""The CUDA libraries behind the contract, on a GPU: verified, timed beside direct calls, mixed, and their traps tried.

python benchmarks/cuda_libraries.py site FOLDER           metadata of the working tree's distributions
python benchmarks/cuda_libraries.py verify NAME --tier contract --out FOLDER --workers 4 --max-seconds 90
python benchmarks/cuda_libraries.py traps mixed models speed host layers --out FOLDER
python benchmarks/cuda_libraries.py trap NAME             one trap, in this process
python benchmarks/cuda_libraries.py cases NAME ID...      cases of the kit, one after the other
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tier", default="contract")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--select", default="")
    parser.add_argument("--max-cases", type=int)
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--backends", default="fa3,flashinfer,flashmla,flashinfer_mla")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what[0] == "site":
        from cuda.site import source_path, write_site

        write_site(Path(given.what[1]))
        print(source_path())
        return
    if given.what[0] == "verify":
        from cuda.verify import run_verify

        for name in given.what[1:]:
            run_verify(name, given.tier, given.out, given.workers, given.select, given.max_cases, given.max_seconds)
        return
    if given.what[0] == "cases":
        from attn_core.testing.runner import verify

        for case in given.what[2:]:
            (result,) = verify(given.what[1], "stress", "cuda", case=case, workers=1).results
            print(f"[cases] {result.status} {case} {' '.join(str(fault)[:200] for fault in result.faults)}", flush=True)
        return
    if given.what[0] == "trap":
        from cuda.traps import run_trap

        print(json.dumps(run_trap(given.what[1])))
        return
    for what in given.what:
        _run(what, given)


def _run(what: str, given: argparse.Namespace) -> None:
    if what == "speed":
        from attn_core.bench.run import results
        from attn_core.planning.system import detect
        from cuda.speed import speed_rows

        rows, system = [], detect()
        for name in given.backends.split(","):
            for row in speed_rows(given.seconds, name):
                rows.append(row)
                results(rows, system).write(given.out / "cuda_libraries.json")
        return
    if what == "host":
        from cuda.host import host_rows

        write_rows(given.out / "cuda_host.json", host_rows())
        return
    if what == "layers":
        import torch
        from cuda.layers import layer_rows

        found = []
        with torch.inference_mode():
            for layer_row in layer_rows(given.backends.split(","), given.rounds):
                found.append(layer_row)
                write_rows(given.out / "cuda_layers.json", found)
        return
    if what == "traps":
        from cuda.traps import run_traps as run
    elif what == "mixed":
        from cuda.mixed_plans import run_mixed as run
    elif what == "models":
        from cuda.models import run_models as run
    else:
        raise SystemExit(f"{what!r}: one of site, verify, speed, traps, mixed, models, host, layers")
    path = given.out / "cuda_models.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    write_rows(path, [*before, *({"part": what, **row} for row in run())])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A result file with this machine's device and versions."""
    from attn_core.bench.results import SCHEMA
    from attn_core.planning.system import detect
    from attn_core.testing.devices import device_name

    system = detect()
    wanted = {
        "torch", "triton", "transformers", "flashinfer-python", "tokenspeed-fa3", "sgl-flash-mla", "flash-attn-4",
    }  # fmt: skip
    installed = sorted(system.dists.items())
    versions = {name: version for name, version in installed if name in wanted or name.startswith("attn-")}
    head = {"schema": SCHEMA, "version": 1, "device": device_name("cuda"), "date": str(datetime.date.today())}
    path.write_text(json.dumps({**head, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
