"""Stand-ins for the CANN libraries that torch-npu links to, so that it imports without them. For tests only.

Two sets: `empty` has a function that returns 0 behind every name that torch-npu leaves undefined, and `device` adds
what one card needs (allocation, copies, streams, capture), written in acl.c over host memory. No CANN code is used.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from ctypes.util import find_library
from pathlib import Path

#: The libraries of CANN and NNAL that torch-npu names as needed.
LIBRARIES = (
    "libhccl.so", "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so",
    "libacl_tdt_channel.so", "libatb.so",
)  # fmt: skip
_CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH", "ASCEND_AICPU_PATH", "ATB_HOME_PATH")
_VENDOR_NAME = re.compile(rb"\x00((?:acl|hccl|Hccl|Hcom|rt|ge)[A-Za-z0-9_]{4,80})(?=\x00)")


class RealCannError(RuntimeError):
    """CANN is on this machine: a stub beside it could be taken for the real thing."""


def refuse_real_cann(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Raise RealCannError where CANN, its driver or a card is found."""
    found = [f"${name}" for name in _CANN_VARIABLES if environ.get(name)]
    found += [str(path) for path in (root / "usr/local/Ascend", root / "dev/davinci_manager") if path.exists()]
    found += [str(path) for path in (root / "dev").glob("davinci[0-9]*")]
    if root == Path("/") and (library := find_library("ascendcl")):
        found.append(library)
    if found:
        raise RealCannError(
            f"stubs of CANN are for machines without it; here is {', '.join(found)}: run the silicon tests"
        )


def write_stubs(target: Path, torch_npu: Path, torch: Path) -> dict[str, Path]:
    """Build both sets below ``target``: {"empty": folder, "device": folder}, each an LD_LIBRARY_PATH.

    Raises RealCannError on a machine with CANN, and CalledProcessError where nm or gcc is missing or fails.
    """
    refuse_real_cann()
    libraries = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]
    undefined = _undefined(libraries, [*libraries, *torch.glob("lib/*.so*"), *_system_libraries()])
    sets = {name: target / name for name in ("empty", "device")}
    own = Path(__file__).with_name("acl.c")
    written = set(re.findall(r"\b(?:acl|fake)\w+(?=\()", own.read_text(encoding="utf-8")))
    looked_up = _names_in(torch_npu / "lib" / "libtorch_npu.so")
    _build(sets["empty"], undefined)
    _build(sets["device"], (undefined | looked_up) - written, own)
    return sets


def _build(folder: Path, names: set[str], *sources: Path) -> None:
    """All libraries into ``folder``: one holds every name, and the others lead there, whichever is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "libascendcl.so"
    _shared(holder, [_source(folder / "zero.s", _assembly(names)), *sources])
    for name in LIBRARIES:
        if name != holder.name:
            _shared(
                folder / name,
                [_source(folder / "nothing.s", _note())],
                "-Wl,--no-as-needed",
                f"-L{folder}",
                "-lascendcl",
            )


def _undefined(of: Iterable[Path], given: Iterable[Path]) -> set[str]:
    """Names that the libraries need and nothing here defines."""
    wanted = {name for path in of for name, kind in _symbols(path, "--undefined-only") if kind not in "wv"}
    defined = {name for path in given for name, _ in _symbols(path, "--defined-only")}
    return {name for name in wanted - defined if not name.startswith(("Py", "_Py"))}


def _symbols(path: Path, which: str) -> list[tuple[str, str]]:
    listing = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [(row[-1].partition("@")[0], row[-2]) for row in rows if len(row) >= 2]


def _system_libraries() -> list[Path]:
    names = ("c", "m", "stdc++", "gcc_s", "pthread", "dl", "rt")
    files = [find_library(name) for name in names]
    folders = [Path(f) for f in ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")]
    folders += [Path("/lib/aarch64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu")]
    loader = [*Path("/lib64").glob("ld-linux*"), *Path("/lib").glob("ld-linux*")]
    found = [folder / file for file in files if file for folder in folders if (folder / file).exists()]
    return [*found, *loader]


def _names_in(library: Path) -> set[str]:
    """Vendor functions that the library looks up by name when it runs."""
    return {name.decode() for name in _VENDOR_NAME.findall(library.read_bytes())}


def _assembly(names: Iterable[str]) -> str:
    zero = "xorl %eax,%eax\nret" if os.uname().machine == "x86_64" else "mov x0,#0\nret"
    lines = [".text"]
    for name in sorted(names):
        if re.match(r"_ZT[VIS]", name):  # a vtable or type: data
            lines += [".data", f".globl {name}", f".type {name},@object", f"{name}:", ".zero 512", ".text"]
        else:
            lines += [f".globl {name}", f".type {name},@function", f"{name}:", zero]
    return "\n".join([*lines, _note()])


def _note() -> str:
    return '.section .note.GNU-stack,"",@progbits\n'


def _source(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _shared(target: Path, sources: list[Path], *options: str) -> None:
    name = f"-Wl,-soname,{target.name}"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(target), name, *map(str, sources), *options], check=True
    )


if __name__ == "__main__":
    packages = Path(sysconfig.get_path("purelib"))
    for path in map(Path, sys.path):
        if (path / "torch" / "lib").is_dir():
            torch_folder = path / "torch"
    made = write_stubs(Path(sys.argv[1]), packages / "torch_npu", torch_folder)
    print("setup: CANN stubs in", *made.values())
