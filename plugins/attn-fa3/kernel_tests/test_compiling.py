"""Each Triton kernel of this package compiles for Hopper, in a process where Triton does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys

ROWS = {"q": "*bf16", "out": "*fp8e4nv", "descales": "*fp32"}
TILE = {"GROUP": 4, "WIDTH": 128}
#: module.kernel: types of its arguments that are not int32, pointers those that begin with *, and its constants
KERNELS = {
    "join._join": (
        {"o1": "*bf16", "l1": "*fp32", "o2": "*bf16", "l2": "*fp32", "sinks": "*fp32", "out": "*bf16", "lse": "*fp32"},
        {"HEADS": 8, "WIDTH": 128, "SECOND": True, "SINK": True, "LSE": True},
    ),
    "tree._own_keys": (
        {"visible": "*u8", "prefix_lens": "*i32", "page_table": "*i32", "slots": "*i32", "counts": "*i32"},
        {"Q": 16, "WINDOWED": True},
    ),
    "quantize._uniform": (ROWS, TILE),
    "quantize._largest": (ROWS | {"starts": "*i32", "bits": "*i32"}, TILE),
    "quantize._scaled": (ROWS | {"starts": "*i32", "bits": "*i32"}, TILE),
}
PROGRAM = """
import json, sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name, (types, constants) in json.load(sys.stdin).items():
    module, _, function = name.partition(".")
    kernel = getattr(import_module(f"attn_fa3.kernels.{module}"), function)
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
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
