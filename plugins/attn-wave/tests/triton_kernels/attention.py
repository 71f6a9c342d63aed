"""A causal attention kernel in Triton, compiled for gfx942: `python -m` writes what tests without Triton run.

.venvs/triton-tests/bin/python plugins/attn-wave/tests/triton_kernels/attention.py
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from attn_wave.emulator.code_object import disassemble
from attn_wave.emulator.listing import listing_of, packed
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTH, KEYS, ROWS, WARPS = 64, 32, 64, 4
CODE = Path(__file__).parent / "attention.hsaco.xz"
LISTING = CODE.with_suffix("").with_suffix(".listing.xz")
SIGNATURE = {
    "Q": "*fp16", "K": "*fp16", "V": "*fp16", "Out": "*fp32", "queries": "i32", "keys": "i32", "scale": "fp32",
    "WIDTH": "constexpr", "KEYS": "constexpr", "ROWS": "constexpr",
}  # fmt: skip


@triton.jit
def attention(
    Q, K, V, Out, queries, keys, scale, WIDTH: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    q = tl.load(Q + row[:, None] * WIDTH + column[None, :], mask=row[:, None] < queries, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        k = tl.load(K + key[:, None] * WIDTH + column[None, :], mask=key[:, None] < keys, other=0.0)
        v = tl.load(V + key[:, None] * WIDTH + column[None, :], mask=key[:, None] < keys, other=0.0)
        x = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
        seen = (key[None, :] < keys) & (key[None, :] <= row[:, None] + keys - queries)
        x = tl.where(seen, x, -1e30)
        new = tl.maximum(top, tl.max(x, 1))
        weight = tl.exp2(x - new[:, None])
        decay = tl.exp2(top - new)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.dot(weight.to(tl.float16), v)
        top = new
    tl.store(Out + row[:, None] * WIDTH + column[None, :], acc / total[:, None], mask=row[:, None] < queries)


def compiled() -> Any:
    """For gfx942, with its metadata."""
    # no paths of the machine it is compiled on
    triton.knobs.compilation.disable_line_info = True
    constants = {"WIDTH": WIDTH, "KEYS": KEYS, "ROWS": ROWS}
    return triton.compile(
        ASTSource(attention, SIGNATURE, constants),
        target=GPUTarget("hip", "gfx942", 64),
        options={"num_warps": WARPS},
    )


def write() -> None:
    """The code object and its listing; its LDS is said by the launch."""
    found = compiled()
    CODE.write_bytes(lzma.compress(found.kernel, preset=9))
    LISTING.write_bytes(packed([listing_of(found.kernel, tuple(disassemble(found.kernel, "gfx942")))]))
    print(f"{len(found.kernel)} bytes, LDS {found.metadata.shared}")


if __name__ == "__main__":
    write()
