"""Compiles every variant for an architecture: ship_kernels.py [--facts | --listings] gfx942 [KEY ...]

Into the folder that the wheel ships: code objects, the facts about them, and their disassembly. With --facts only the
facts, for a chip that the manifest does not claim; with --listings only the disassembly anew.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

from attn_wave.compiler import compile_variant, sources, wave_version
from attn_wave.emulator.code_object import disassemble
from attn_wave.emulator.listing import listing_of, packed, shipped_path
from attn_wave.join_variant import all_kernels, kernel_of

PACKAGE = Path(__file__).parent.parent / "src" / "attn_wave"


def compile_all(arch: str, only: list[str], *, facts_alone: bool) -> None:
    """Write each code object as soon as it is there and its facts with it; those that are current already are left."""
    folder = PACKAGE / "shipped" / arch
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    versions = {"sources": sources(), "wave-lang": wave_version()}
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {"versions": {}}
    before = known["versions"].get("sources", {}) if known["versions"].get("wave-lang") == wave_version() else {}
    same = {kernel for kernel, hashed in sources().items() if before.get(kernel) == hashed}
    current = {variant.key for variant in all_kernels() if kernel_of(variant) in same}
    kernels: dict[str, Any] = {key: facts for key, facts in known.get("kernels", {}).items() if key in current}
    for variant in all_kernels():
        if variant.key in kernels or (only and variant.key not in only):
            continue
        made = compile_variant(variant, arch)
        if not facts_alone:
            (folder / f"{variant.key}.hsaco.xz").write_bytes(lzma.compress(made.blob, preset=9))
        kernels[variant.key] = made.record()
        ordered = {"versions": versions, "kernels": dict(sorted(kernels.items()))}
        index.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        print(variant.key, made.facts, flush=True)


def write_listings(arch: str) -> None:
    """What the emulator reads in place of a disassembler."""
    blobs = [lzma.decompress(path.read_bytes()) for path in sorted((PACKAGE / "shipped" / arch).glob("*.hsaco.xz"))]
    listings = [listing_of(blob, tuple(disassemble(blob, arch))) for blob in blobs]
    (PACKAGE / shipped_path(arch)).write_bytes(packed(listings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", action="store_true")
    parser.add_argument("--listings", action="store_true")
    parser.add_argument("arch")
    parser.add_argument("keys", nargs="*")
    asked = parser.parse_args()
    if not asked.listings:
        compile_all(asked.arch, asked.keys, facts_alone=asked.facts)
    if not asked.facts:
        write_listings(asked.arch)
