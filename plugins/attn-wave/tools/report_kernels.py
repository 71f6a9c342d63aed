"""Writes docs/amd-kernels.md: what compiling each kernel took, and what it uses of a chip, from the shipped facts."""

from __future__ import annotations

from pathlib import Path

from attn_wave.join_variant import all_kernels
from attn_wave.shipped import ARCHITECTURES, index

DOCUMENT = Path(__file__).parents[3] / "docs" / "amd-kernels.md"
_COLUMNS = {
    "compile_seconds": "s", "matrix_instructions": "MFMA", "vgprs": "VGPR", "sgprs": "SGPR", "lds": "LDS",
    "spilled_vgprs": "spilled",
}  # fmt: skip


def report() -> str:
    """The document."""
    version = index(ARCHITECTURES[0])["versions"]["wave-lang"]
    heads = [f"{arch} {text}" for arch in ARCHITECTURES for text in _COLUMNS.values()]
    lines = [
        "# The kernels of `wave`",
        "",
        "Rendered by `plugins/attn-wave/tools/report_kernels.py` from the facts that ship with the kernels, which",
        f"wave-lang {version} compiled on one core of a busy machine. `s`: seconds of compiling; `MFMA`: matrix",
        "instructions in the code. Registers and LDS bytes are what the code object itself states, and tests hold them",
        "to the chip. What is of gfx942 ships, and ran in the emulator; what is of gfx950 was compiled and no more.",
        "**silicon: never run.** See [AMD Instinct](amd.md).",
        "",
        f"| kernel | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(heads),
    ]
    for variant in all_kernels():
        facts = [index(arch)["kernels"][variant.key] for arch in ARCHITECTURES]
        lines.append(f"| `{variant.key}` | {' | '.join(str(fact[name]) for fact in facts for name in _COLUMNS)} |")
    sums = [sum(fact["compile_seconds"] for fact in index(arch)["kernels"].values()) for arch in ARCHITECTURES]
    each = " | | | | | |".join(f" {total:.0f}" for total in sums)
    lines.append(f"| all {len(list(all_kernels()))} |{each} | | | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(report(), encoding="utf-8")
