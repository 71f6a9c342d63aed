"""The kernels of FlashAttention 4 that the kit's cases need, compiled ahead into the library's own cache on disk.

python plugins/attn-fa3/gpu/fa4_kernels.py list KERNELS.json                     which they are, from the kit's cases
python plugins/attn-fa3/gpu/fa4_kernels.py compile KERNELS.json --processes 16 --seconds 200

Nothing is launched. No GPU is needed: without one, tensors of the CPU say that they lie on ``cuda:0``. A kernel is
known by the library's own key, and is compiled by a call that has this key. The library compiles without a lock:
processes that meet a kernel at once compile it several times, and a case waits for each of its kernels in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, Final

#: The chip that is compiled for; FlashAttention 4 reads these when it is imported.
TARGET: Final = {
    "FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
}  # fmt: skip
_CUDA: Final = 2  # kDLCUDA
_DEVICE_OFFSET: Final = 8  # of DLTensor.device, behind the pointer to the data


class Compiler:
    """The library of this process, for one key at a time: its cache asks us whether it has a kernel."""

    def __init__(self) -> None:
        import flash_attn.cute.interface as interface
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tvm_ffi: Any = import_module("tvm_ffi")

        self.interface, self.store = interface, interface._flash_attn_fwd.compile_cache
        self._kept: list[object] = []
        self._from_dlpack = tvm_ffi.from_dlpack
        if self.device == "cpu":
            tvm_ffi.from_dlpack = self._as_cuda
        interface.is_fake_mode = lambda: True
        interface._flash_attn_fwd.compile_cache = self
        softcaps = {value: interface.utils.create_softcap_scoremod(value) for value in (1.5, 20.0)}
        self.softcaps = {False: 0.0} | {interface.utils.hash_callable(f): value for value, f in softcaps.items()}
        self.met: list[Any] = []
        self.wanted: str | None = None

    def _as_cuda(self, tensor: Any, *_: object, **__: object) -> Any:
        """The tensor as one of ``cuda:0``; only its form is read."""
        ours = self._from_dlpack(tensor)
        capsule = ours.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address: int = pointer(capsule, b"dltensor")
        (ctypes.c_int * 2).from_address(address + _DEVICE_OFFSET)[:] = [_CUDA, 0]
        self._kept += [tensor, ours, capsule]
        return self._from_dlpack(_Capsule(capsule))

    def __contains__(self, key: Any) -> bool:
        found = self.store._key_to_hash(key)
        if self.wanted is None:
            self.met.append((found, key))
            return True
        if found != self.wanted:
            raise RuntimeError(f"another key than the list has: {key}")
        return False

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self.store._try_export_to_storage(key, kernel)

    def is_there(self, name: str) -> bool:
        path = self.store.cache_path / f"{name}.o"
        return bool(path.exists() and path.stat().st_size > 0)

    def compile(self, kernel: dict[str, Any]) -> None:
        """Compiles the kernel into the cache on disk. Raises RuntimeError if it is not there then."""
        self.wanted = kernel["hash"]
        self._kept.clear()
        self.call(kernel)
        if not self.is_there(kernel["hash"]):
            raise RuntimeError(f"not in the cache: {kernel}")

    def call(self, kernel: dict[str, Any]) -> None:
        """A call of the library that needs just this kernel."""
        import torch

        with torch.device(self.device):
            self._call(kernel)

    def _call(self, kernel: dict[str, Any]) -> None:
        import torch

        dtype, width, heads = getattr(torch, kernel["dtype"]), kernel["head_dim"], 2 * kernel["group"]
        sinks = torch.zeros(heads, dtype=getattr(torch, kernel["sinks"])) if kernel["sinks"] else None
        named: dict[str, Any] = {
            "causal": kernel["causal"] or kernel["window"], "window_size": (5, 0) if kernel["window"] else (None, None),
            "softcap": kernel["softcap"], "learnable_sink": sinks, "return_lse": kernel["lse"], "num_splits": 1,
        }  # fmt: skip
        rows = 1 if kernel["one_tile"] else 300
        q = torch.empty(2, rows, heads, width, dtype=dtype)
        if not kernel["uniform"]:
            q = q.flatten(0, 1)
            named |= {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32), "max_seqlen_q": rows}
        if kernel["paged"]:
            k = torch.empty(8, 16, 2, width, dtype=dtype)
            named |= {"page_table": torch.zeros(2, 4, dtype=torch.int32)}
            named |= {"seqused_k": torch.zeros(2, dtype=torch.int32)}
        else:
            k = torch.empty(32, 2, width, dtype=dtype)
            named |= {"cu_seqlens_k": torch.zeros(3, dtype=torch.int32), "max_seqlen_k": 16}
        self.interface.flash_attn_varlen_func(q, k, torch.empty_like(k), **named)

    def described(self, name: str, part: str, key: Any, call: dict[str, Any]) -> dict[str, Any]:
        """The kernel of a key that a call of ours asked for, as the list has it."""
        q, k, sink = call["q"], call["k"], call["learnable_sink"]
        group = q.shape[-2] // k.shape[-2]
        window, softcap = call["window_size"] != (None, None), call["softcap"]
        kernel = {
            "hash": name, "part": part, "dtype": str(q.dtype)[6:], "head_dim": q.shape[-1], "group": group,
            "causal": call["causal"] and not window, "window": window, "softcap": softcap,
            "sinks": str(sink.dtype)[6:] if sink is not None else "", "lse": call["return_lse"],
            "uniform": "cu_seqlens_q" not in call, "paged": "page_table" in call, "one_tile": True,
        }  # fmt: skip
        for one_tile in (True, False):  # whether a request's queries fit into a tile is the library's own reckoning
            self.met.clear()
            self.call(kernel | {"one_tile": one_tile})
            if self.met[-1][0] == name:
                return kernel | {"one_tile": one_tile}
        raise SystemExit(f"no call has this key: {key}")


class _Capsule:
    def __init__(self, capsule: object) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0


def list_kernels(path: Path) -> None:
    """Runs the kit's cases on the CPU, in the order of a run, without computing or comparing anything."""
    import attn_core.testing.fuzz as fuzz
    import attn_core.testing.run as run
    import torch
    from attn_core.planning.discovery import discover
    from attn_core.planning.system import System
    from attn_core.testing import alone, graphs, ragged
    from attn_core.testing.agenda import FUZZ, agenda
    from attn_core.testing.cases import Case
    from attn_core.testing.claimed import is_claimed
    from attn_fa3.fa4 import FA4Backend

    compiler, kernels, seen, now = Compiler(), [], set(), [""]

    class Recorder(FA4Backend):
        def __init__(self, config: Any, kv_cache: Any) -> None:
            super().__init__(config, kv_cache)
            attend = self._attend

            def recorded(q: Any, k: Any, v: Any, **named: Any) -> Any:
                compiler.met.clear()
                result = attend(q, k, v, **named)
                for name, key in compiler.met.copy():
                    if name not in seen:
                        seen.add(name)
                        kernels.append(compiler.described(name, now[0], key, {"q": q, "k": k, **named}))
                return result

            self._attend = recorded

    for module in (run, graphs, ragged, alone):
        for check in ("output_faults", "write_faults", "form_faults"):
            vars(module).update({check: lambda *_, **__: []} if hasattr(module, check) else {})
        for name, value in {"problems": (), "expect": None, "differing": None}.items():
            vars(module).update({name: lambda *_, value=value, **__: value} if hasattr(module, name) else {})
    vars(run)["build"] = lambda planned, cache, installed=None: Recorder(planned.config, cache)
    ref, system = discover().find("fa4"), System.parse("cuda:sm_90")
    target, plan = run.Target(ref, system, torch.device("cpu")), agenda(ref.manifest, "stress", system)
    counts: Counter[tuple[str, str]] = Counter()

    def tried(case: Case, target: run.Target) -> run.Result:
        if is_claimed(ref.manifest, case, system):
            result = run.run_case(case, target)
            counts[now[0], result.status] += 1
            if result.status != "passed":
                print(f"{result.status} {case.id} {result.faults[:1]} {result.note}", flush=True)
        return run.Result(case, "passed")

    fuzz.try_one = tried
    for job in plan.jobs():
        if (
            isinstance(job, Case) and not job.refused and not job.far
        ):  # far ones need gigabytes, and no kernel of their own
            now[0] = plan.parts[job]
            tried(job, target)
    now[0] = FUZZ
    for share in plan.shares:
        fuzz.run_share(share, target)
    kernels.sort(key=lambda kernel: ["contract", "numerics", "stress", FUZZ].index(kernel["part"]))
    path.write_text(json.dumps(kernels))
    print(f"[fa4 kernels] {len(kernels)}: {dict(Counter(k['part'] for k in kernels))} of {dict(counts)}", flush=True)


_compiler: list[Compiler] = []
_made: list[str] = []
#: Kernels between two collections of garbage: collecting as usual takes a fifth to a third of the time of a kernel.
_COLLECTED_AFTER: Final = 8


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    _compiler.append(Compiler())
    gc.freeze()
    gc.disable()


def _compile(task: tuple[dict[str, Any], float]) -> float:
    """Seconds that it took; 0 if it was there, if the time is over, or if it cannot be compiled, which is printed."""
    kernel, deadline = task
    begun = time.time()
    if begun > deadline or _compiler[0].is_there(kernel["hash"]):
        return 0.0
    try:
        _compiler[0].compile(kernel)
    except Exception as error:
        print(f"[fa4 kernels] {type(error).__name__}: {str(error)[:300]} | {kernel}", flush=True)
        return 0.0
    _made.append(kernel["hash"])
    if len(_made) % _COLLECTED_AFTER == 0:
        gc.collect()
    return time.time() - begun


def compile_kernels(kernels: list[dict[str, Any]], processes: int, seconds: float) -> None:
    """Those that the cache lacks, in the order of the list, each once, by processes that take the next."""
    begun, made, spent = time.time(), 0, 0.0
    with multiprocessing.get_context("spawn").Pool(processes, _begin) as pool:
        compiler = Compiler()
        for took in pool.imap_unordered(_compile, [(kernel, begun + seconds) for kernel in kernels]):
            made, spent = made + (took > 0), spent + took
            if took and made % 100 == 1:
                print(
                    f"[fa4 kernels] {made} made, {spent / made:.1f} s each, at {time.time() - begun:.0f} s", flush=True
                )
    there = Counter(kernel["part"] for kernel in kernels if compiler.is_there(kernel["hash"]))
    print(f"[fa4 kernels] {made} made in {time.time() - begun:.0f} s; there are {dict(there)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "compile"])
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--most", type=int, default=1_000_000)
    given = parser.parse_args()
    os.environ.update(TARGET)
    if given.what == "list":
        list_kernels(given.kernels)
    else:
        compile_kernels(json.loads(given.kernels.read_text())[: given.most], given.processes, given.seconds)


if __name__ == "__main__":
    main()
