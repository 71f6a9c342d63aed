"""The conformance kit over attn-triton, its kernels compiled for gfx942 and run in the emulator.

`make verify-wave-triton`: what `attn verify triton` is on a card, with evidence of the level isa-emulated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from attn_core.testing import Report, verify
from attn_core.testing.run import Result
from attn_triton.backend import TritonBackend
from attn_wave.emulator.device import Gfx942

from .emulated import addresses_heard, on_gfx942


def versions(chip: Gfx942) -> Mapping[str, str]:
    """In place of what Wave's kernels are compiled by."""
    return {"kernels compiled by": f"triton {version('triton')}"}


@contextmanager
def triton_on_the_emulator() -> Iterator[None]:
    """`TritonBackend` as it is built on an MI300X, but that its kernels run in the emulator."""
    build, said = TritonBackend.__init__, Gfx942.versions

    def emulated(self: TritonBackend, config: Any, kv_cache: Any) -> None:
        build(self, config, kv_cache, **on_gfx942())

    try:
        TritonBackend.__init__, Gfx942.versions = emulated, versions  # type: ignore[method-assign, assignment]
        with addresses_heard():
            yield
    finally:
        TritonBackend.__init__, Gfx942.versions = build, said  # type: ignore[method-assign]


def run(**options: Any) -> Report:
    """As `verify`: in this process, since others would not have the kernels in the emulator."""
    with triton_on_the_emulator():
        return verify("triton", "contract", "emulated:gfx942", workers=0, **options)


def main() -> None:
    """Prints a line every few cases, and the failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evidence", dest="evidence_dir")
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument("--max-cases", type=int)
    parser.add_argument("--select", default="")
    parser.add_argument("--junit")

    def progress(done: int, total: int, result: Result) -> None:
        if result.status == "failed":
            print(f"failed: {result.case.id}: {result.faults}", flush=True)
        if done % 25 == 0 or done == total:
            print(f"{done} of {total}", flush=True)

    report = run(**vars(parser.parse_args()), progress=progress)
    counts = ", ".join(f"{report.count(name)} {name}" for name in ("passed", "failed", "not_run"))
    print(f"triton on {report.device}, {report.level}: {counts}, {report.seconds:.0f} s")
    raise SystemExit(bool(report.failures))


if __name__ == "__main__":
    main()
