"""Builds the FlashInfer modules that the kit's cases need, the most needed first, and packs them to be carried along.

FlashInfer compiles a module for each dtype, cache dtype, head size, window on or off and soft cap on or off, with nvcc,
when first used. Built modules put into ``flashinfer/data/aot`` are loaded from there, by any machine of that chip.

    python build_modules.py --out FOLDER --seconds 500      build until then, pack what is finished
    python build_modules.py --install FILE...               unpack packs into the installed FlashInfer
    python build_modules.py --list                          print the modules, and which are there

No GPU is needed: nvcc is, and FLASHINFER_CUDA_ARCH_LIST=9.0a; where there is no libcuda, a stub of it in a folder that
FLASHINFER_EXTRA_LDFLAGS=-L... names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attn_flashinfer
import flashinfer
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System
from attn_core.testing.agenda import REFUSALS, agenda
from attn_flashinfer.modules import Module, modules_of
from unused_masks import leave_out

AOT = Path(flashinfer.__file__).parent / "data" / "aot"
PACK_BYTES = 15 << 20
#: What the benchmarks use comes before what only the conformance kit does.
FIRST = tuple(Module("bfloat16", "auto", 128, 128, False, False, kernels) for kernels in ("fa2", "fa3"))


def needed() -> list[Module]:
    """Every module of every case of the kit on Hopper: by how many of the cases that a proof needs do need it, then by
    how many cases do.
    """
    folder = Path(attn_flashinfer.__file__).parent
    proofs: Counter[Module] = Counter()
    count: Counter[Module] = Counter()
    for name in ("flashinfer_mla", "flashinfer"):
        plan = agenda(Manifest.parse((folder / f"{name}.toml").read_text()), "stress", System.parse("cuda:sm_90"))
        for case, part in plan.parts.items():
            if part == REFUSALS:
                continue
            config = case.config()
            modules = {m for p in case.phases for k in config.kinds(p) for m in modules_of(config, k, p, (9, 0))}
            count.update(modules)
            proofs.update(modules if case in plan.required else ())
    return sorted(count, key=lambda module: (module not in FIRST, -proofs[module], -count[module]))


def place(name: str, library: Path) -> None:
    """Put a built module where FlashInfer loads it from without looking at its sources."""
    folder = AOT / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(library, folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / f"{name}.so")


def build(modules: list[Module], seconds: float, at_once: int, skip: frozenset[str]) -> None:
    """Build until the time is up, in this order; what is being built then is left behind."""
    deadline = time.monotonic() + seconds
    say = threading.Lock()

    def one(module: Module) -> None:
        if time.monotonic() > deadline - 40:
            return
        spec = module.spec()
        if spec.is_aot or spec.name in skip:
            return
        begun = time.monotonic()
        try:
            leave_out(module, [Path(source) for source in spec.sources])
            spec.build(verbose=False)
            place(spec.name, spec.jit_library_path)
            text = f"{time.monotonic() - begun:.0f} s"
        except Exception as error:
            text = f"FAILED {str(error)[-400:]}"
        with say:
            print(f"[modules] {time.monotonic() - (deadline - seconds):.0f} s: {tuple(module)} {text}", flush=True)

    executor = ThreadPoolExecutor(at_once)
    futures = [executor.submit(one, module) for module in modules]
    while not all(future.done() for future in futures) and time.monotonic() < deadline:
        time.sleep(1)
    executor.shutdown(wait=False, cancel_futures=True)


def pack(out: Path, skip: frozenset[str]) -> None:
    """All modules in AOT but those to skip, in packs small enough to travel."""
    out.mkdir(parents=True, exist_ok=True)
    libraries = [path for path in sorted(AOT.glob("*/*.so")) if path.parent.name not in skip]
    number, archive = 0, None
    for library in libraries:
        path = out / f"modules-{number}.tar.xz"
        if archive is not None and path.stat().st_size > PACK_BYTES - (2 << 20):
            archive.close()
            archive, number = None, number + 1
            path = out / f"modules-{number}.tar.xz"
        if archive is None:
            archive = tarfile.open(path, "w:xz", preset=1)  # noqa: SIM115 - closed when it is full
        archive.add(library, arcname=f"{library.parent.name}/{library.name}")
    if archive is not None:
        archive.close()
    print(f"[modules] packed {len(libraries)} modules in {number + 1} packs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--install", type=Path, nargs="*")
    parser.add_argument("--skip", type=Path, help="names of modules that need not be built or packed, one a line")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    for path in given.install or []:
        with tarfile.open(path) as archive:
            archive.extractall(AOT, filter="data")
    if given.list:
        for module in needed():
            print("here " if module.spec().is_aot else "     ", *module)
    if given.out is not None:
        skip = frozenset(given.skip.read_text().split()) if given.skip else frozenset()
        build(needed(), given.seconds, given.at_once, skip)
        pack(given.out, skip)
        print("[modules] done", flush=True)
        os._exit(0)  # without waiting for compilers that are still at it


if __name__ == "__main__":
    main()
