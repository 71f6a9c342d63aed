"""Compiling the kernels of a config for a chip that is not here: ``python -m attn_triton.ahead sm_100 llama``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import triton
from attn_core.errors import CheckFailedError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.kv_cache import KVCache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from attn_triton.chip import Chip
from attn_triton.launch import Direct, Launcher, Launchers, Pointer

#: What these chips have, from their vendors' tables: (multiprocessors, bytes of shared memory for one block).
CHIPS: Final = {
    "sm_80": (108, 163 << 10),
    "sm_90": (132, 227 << 10),
    "sm_100": (148, 227 << 10),
    "gfx942": (304, 64 << 10),
    "gfx950": (256, 160 << 10),
}

#: What looks at every kernel that was compiled, as Triton gives it.
FINISHED: Final[list[Callable[[Any], object]]] = []

_TYPES: Final = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel that compiled: bytes of shared memory, and of the binary."""

    kernel: str
    warps: int
    shared: int
    size: int
    constants: dict[str, Any]


class AheadLaunchers(Launchers):
    """Launchers that compile for ``chip`` and launch nothing; ``compiled`` lists what was."""

    def __init__(self, chip: Chip) -> None:
        super().__init__(torch.device("cpu"), dependent=chip.dependent_launch)
        self.chip = chip
        self.compiled: list[Compiled] = []

    def get(self, kernel: Any, constants: Any, options: Any, dtypes: Any) -> Launcher:
        launcher = super().get(kernel, constants, options, dtypes)
        assert isinstance(launcher, _AheadLauncher)
        launcher.into = self
        return launcher


class _AheadLauncher(Launcher):
    __slots__ = ("into",)
    into: AheadLaunchers

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Direct:
        self.into.compiled.append(compile_for(self.into.chip, self, args, odd))
        return Direct(_nothing, ())


def _nothing(*launched: Any) -> None:
    """In place of a launch."""


AheadLaunchers.launcher = _AheadLauncher


def compile_for(chip: Chip, launcher: Launcher, args: Sequence[Any], odd: frozenset[int]) -> Compiled:
    """``launcher``'s kernel for ``chip``. Raises what Triton raises, CheckFailedError if it needs more shared memory
    than there is.
    """
    source = source_of(launcher.kernel, launcher, args, odd)
    found = triton.compile(source, target=target(chip.arch), options=dict(launcher.options))
    for look in FINISHED:
        look(found)
    result = Compiled(
        launcher.name, found.metadata.num_warps, found.metadata.shared, len(found.kernel), launcher.constants
    )
    if result.shared > chip.shared_memory:
        raise CheckFailedError(f"{result} for {chip}", accepted=f"at most {chip.shared_memory} bytes of shared memory")
    return result


def source_of(kernel: Any, launcher: Launcher, args: Sequence[Any], odd: frozenset[int]) -> ASTSource:
    """``kernel`` with the constants of ``launcher`` and arguments like ``args``, of which those at ``odd`` are no
    multiples of 16.
    """
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | {name: _type(arg) for name, arg in zip(names, args, strict=False)}
    attrs = {(i,): [["tt.divisibility", 16]] for i in sorted(launcher.specialised - odd)}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    return kind(kernel, signature, launcher.constants, attrs)


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def compile_config(config: AttentionConfig, arch: str) -> list[Compiled]:
    """Every kernel that ``config`` needs on ``arch``, compiled here without the device. Raises KernelError."""
    from attn_triton.backend import TritonBackend

    chip = Chip(arch, *CHIPS[arch])
    launchers = AheadLaunchers(chip)
    cache = KVCache.allocate(config, num_pages=2)
    TritonBackend(config, cache, chip=chip, launchers=launchers).warmup(config)
    return launchers.compiled


def _type(arg: Any) -> str:
    if isinstance(arg, Pointer):
        return "*" + _TYPES[arg.dtype]
    if hasattr(arg, "block_shape"):  # a descriptor of the copy engine
        return f"tensordesc<{_TYPES[arg.base.dtype]}{list(arg.block_shape)},{arg.layout!r}>"
    return "fp32" if isinstance(arg, float) else "i32"


def main(arch: str, *presets: str) -> None:
    """Compile presets for ``arch``; one JSON line a kernel."""
    for preset in presets:
        config = AttentionConfig.preset(preset, page_size=16)
        for compiled in compile_config(
            config.replace(kv_layout="MLA" if config.layers[0].kind == "mla" else "NHD"), arch
        ):
            print(json.dumps(asdict(compiled), default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
