"""Each Triton kernel compiles for Hopper and Blackwell, in a process where Triton does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys

TILE = {"HEADS": 8, "WIDTH": 1024}
#: module.kernel: types of its arguments that are not int32, pointers those that begin with *, and its constants
KERNELS = {
    "queries._largest": ({"q": "*bf16", "tables": "*i32", "found": "*fp32"}, TILE),
    "queries._scaled": (
        {"q": "*bf16", "found": "*fp32", "out": "*u8", "scale": "*fp32", "factor": "fp32"},
        TILE | {"BLOCK": 1024},
    ),
}
PROGRAM = """
import json, sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name, (types, constants) in json.load(sys.stdin).items():
    module, _, function = name.partition(".")
    kernel = getattr(import_module(f"attn_mla.kernels.{module}"), function)
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    for arch in (90, 100):
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32))
        print(name, f".target sm_{arch}" in compiled.asm["ptx"])
"""


def test_each_kernel_compiles_for_hopper_and_blackwell() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(KERNELS), env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == [word for name in KERNELS for word in (name, "True") * 2]
