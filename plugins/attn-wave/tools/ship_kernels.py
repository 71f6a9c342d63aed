"""Compiles every variant for an architecture into the folder that the wheel ships: ship_kernels.py gfx942 [KEY ...]"""

from __future__ import annotations

import json
import lzma
import os
import sys
from pathlib import Path

os.environ.setdefault("WAVE_CACHE_ON", "0")

from attn_wave.compiler import compile_variant, sources_hash, wave_version
from attn_wave.variant import all_variants

SHIPPED = Path(__file__).parent.parent / "src" / "attn_wave" / "shipped"


def main(arch: str, only: list[str]) -> None:
    """Write each code object as soon as it is there, and the index last of all."""
    folder = SHIPPED / arch
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    versions = {"sources": sources_hash(), "wave-lang": wave_version()}
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    kernels = known.get("kernels", {}) if known.get("versions") == versions else {}
    for variant in all_variants():
        if variant.key in kernels or (only and variant.key not in only):
            continue
        made = compile_variant(variant, arch)
        (folder / f"{variant.key}.hsaco.xz").write_bytes(lzma.compress(made.blob, preset=9))
        kernels[variant.key] = made.record()
        ordered = {"versions": versions, "kernels": dict(sorted(kernels.items()))}
        index.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        print(variant.key, made.facts, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
