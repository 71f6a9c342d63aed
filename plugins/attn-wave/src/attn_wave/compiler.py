"""Compiling a variant with Wave, for a chip that need not be here."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from attn_core.errors import KernelError, PluginLoadError

from attn_wave.join_variant import AnyVariant, JoinVariant

#: The version that kernels are written for and proved with.
WAVE_VERSION: Final = "3.9.1"
_SOURCES: Final = {
    "attend": ("kernels/attend.py", "kernels/build.py", "variant.py"),
    "join": ("kernels/join.py", "kernels/build_join.py", "kernels/build.py", "join_variant.py", "variant.py"),
}
_COUNTS: Final = {
    "vgprs": "vgpr_count", "agprs": "agpr_count", "sgprs": "sgpr_count", "lds": "group_segment_fixed_size",
    "spilled_vgprs": "vgpr_spill_count",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """A code object and the facts about it; registers and LDS (bytes) are what its metadata states."""

    blob: bytes
    name: str
    block: tuple[int, int, int]
    facts: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The facts as JSON data."""
        return {"name": self.name, "block": list(self.block), "sha256": sha256(self.blob), **self.facts}


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def sources_hash(kernel: str) -> str:
    """Of everything that ``attend`` or ``join`` is compiled from, Wave's own version aside."""
    return sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES[kernel]))[:16]


def sources() -> dict[str, str]:
    """The hash of each."""
    return {kernel: sources_hash(kernel) for kernel in _SOURCES}


def wave_version() -> str | None:
    """Of the installed wave-lang, None if there is none."""
    try:
        return version("wave-lang")
    except PackageNotFoundError:
        return None


def compile_variant(variant: AnyVariant, arch: str) -> Compiled:
    """Compile for ``arch``; 1 to 60 seconds. Raises PluginLoadError without wave-lang, KernelError if Wave fails."""
    if wave_version() is None:
        raise PluginLoadError(
            f"kernel {variant.key} for {arch} is not compiled, and wave-lang is not here",
            accepted=f"wave-lang {WAVE_VERSION}, or a kernel that attn-wave ships",
            hint="pip install 'attn-wave[kernels]'",
        )
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        try:
            launch = _build(variant, arch, folder)
        except Exception as error:
            raise KernelError(f"Wave cannot compile {variant} for {arch}: {error}") from error
        seconds = time.monotonic() - began
        blob = next(Path(folder).glob("*.hsaco")).read_bytes()
        assembly = next(Path(folder).glob("*.rocmasm")).read_text(encoding="utf-8")
    counts = {name: _stated(assembly, key) for name, key in _COUNTS.items()}
    matrix = len(re.findall(r"^\s+v_mfma", assembly, re.MULTILINE))
    facts = {"compile_seconds": round(seconds, 1), "matrix_instructions": matrix, **counts}
    x, y, z = launch.blocks
    return Compiled(blob, launch.func_name, (x, y, z), facts)


def _build(variant: AnyVariant, arch: str, folder: str) -> Any:
    if isinstance(variant, JoinVariant):
        from attn_wave.kernels.build_join import build_join

        return build_join(variant, arch, folder)
    from attn_wave.kernels.build import build

    return build(variant, arch, folder)


def _stated(assembly: str, key: str) -> int:
    match = re.search(rf"\.{key}:\s+(\d+)", assembly)
    if match is None:
        raise KernelError(f"the assembly of a kernel states no {key}")
    return int(match[1])
