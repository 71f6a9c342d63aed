"""Each Triton kernel of this package compiles for Hopper, in a process where Triton does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys

#: kernel: types of its arguments that are no pointers to int32, and its constants
KERNELS = {
    "_expand": ({"row_stride": "i32"}, {"TILE": 1024}),
    "_refill": (
        {"row_stride": "i32", "batch_size": "i32", "page_size": "i32"},
        {"BATCH": 256, "TILE": 4096},
    ),
    "_depths": ({"visible": "*u8", "drafts": "i32"}, {"Q": 16}),
    "_pack": (
        {"packed": "*u8", "visible": "*u8", "window": "i32", "num_spans": "i32", "drafts": "i32"},
        {"TREE": True, "WINDOW": True, "TILE": 512},
    ),
    "_fold": (
        {
            "out": "*bf16", "lse": "*fp32", "sinks": "*fp32", "folded": "*fp32", "out_t": "i32", "out_h": "i32",
            "num_heads": "i32", "width": "i32",
        },
        {"HEADS": 8, "WIDTH": 128, "LSE": True},
    ),
}  # fmt: skip
PROGRAM = """
import json, sys
import triton
from attn_flashinfer.kernels import metadata
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name, (types, constants) in json.load(sys.stdin).items():
    kernel = getattr(metadata, name)
    signature = {n: "constexpr" if n in constants else types.get(n, "*i32") for n in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    print(name, ".target sm_90" in compiled.asm["ptx"])
"""


def test_each_kernel_compiles_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(KERNELS), env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == [word for name in KERNELS for word in (name, "True")]
