"""The compiled modules of FlashInfer that a layer needs, and whether this installation has them or can compile them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.kv_cache import TORCH_DTYPES

from attn_flashinfer.choice import FA3_WIDTHS
from attn_flashinfer.library import load


class Module(NamedTuple):
    """One compiled module: dtype, cache dtype, widths of keys and values, window, soft cap, and the kernels in it:
    fa2, fa3, mla_fa2 or mla_fa3. Page and group sizes are no part of it."""

    dtype: str
    kv_dtype: str
    qk: int
    v: int
    window: bool
    softcap: bool
    kernels: str

    def spec(self) -> Any:
        """What FlashInfer knows of it: its name, and where it is or would be built."""
        made = import_module("flashinfer.jit.attention.modules")
        q = TORCH_DTYPES[self.dtype]
        kv = q if self.kv_dtype == "auto" else TORCH_DTYPES[self.kv_dtype]
        if self.kernels.startswith("mla"):
            rope = self.qk - self.v
            return made.gen_batch_mla_module(self.kernels[4:], q, kv, q, torch.int32, self.v, rope, False)
        make = made._gen_batch_prefill_primary_module if self.kernels == "fa2" else made.gen_batch_prefill_module
        return make(self.kernels, q, kv, q, torch.int32, self.qk, self.v, 0, self.window, self.softcap, False)

    def __str__(self) -> str:
        kv = self.dtype if self.kv_dtype == "auto" else self.kv_dtype
        extras = f"{', window' if self.window else ''}{', softcap' if self.softcap else ''}"
        return f"{self.kernels} {self.dtype} over {kv}, {self.qk}/{self.v}{extras}"


def modules_of(config: AttentionConfig, kind: LayerKind, phase: Phase, capability: tuple[int, int]) -> list[Module]:
    """The modules that layers of ``kind`` can come to need in ``phase``, on a chip of ``capability``; see `choice`."""
    hopper = capability == (9, 0)
    kv = "auto" if kind.ragged else config.kv_cache_dtype
    if kind.kind == "mla":
        kernels = "mla_fa3" if hopper else "mla_fa2"
        return [Module(config.dtype, kv, kind.qk_head_dim, kind.v_head_dim, False, False, kernels)]
    widths, capped, windowed = (kind.qk_head_dim, kind.v_head_dim), kind.softcap > 0, kind.sliding_window is not None
    masked = Module(config.dtype, kv, *widths, False, capped, "fa2")
    plain = masked._replace(window=windowed)
    fast = hopper and kv == "auto" and not windowed and not capped
    fast = fast and widths in FA3_WIDTHS.get(TORCH_DTYPES[config.dtype], ())
    if kind.cross:
        return [masked]
    if phase == "decode":
        return [plain]
    if phase == "verify":
        return [masked if config.speculative_eagle_topk > 1 else plain]
    spans = [masked] if config.bidirectional_spans and not kind.ragged else []
    return [plain._replace(kernels="fa3") if fast else plain, *spans]


def missing_modules(config: AttentionConfig, phase: Phase) -> Iterator[Reason]:
    """A reason for each module that ``phase`` needs and this installation neither has nor can compile.

    FlashInfer would find that out in the middle of a step. Raises PluginLoadError if it cannot be imported.
    """
    load()
    cannot = why_not_compiled()
    if cannot is None:
        return
    shipped_only = bool(os.environ.get("FLASHINFER_DISABLE_JIT"))
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    for i, kind in enumerate(config.layers):
        if kind not in config.kinds(phase):
            continue
        for module in modules_of(config, kind, phase, capability):
            spec = module.spec()
            if not (spec.is_aot if shipped_only else spec.is_compiled):
                hint = "install FlashInfer's compiled modules, or let it compile them"
                yield reason("build_unsupported", "flashinfer_module", str(module), cannot, hint, kind=i)


def why_not_compiled() -> str | None:
    """Why this installation cannot compile a module that is not there; None if it can."""
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return "not compiled, and FLASHINFER_DISABLE_JIT is set"
    given = os.environ.get("FLASHINFER_NVCC")
    try:
        nvcc = Path(given or import_module("flashinfer.jit.cpp_ext").get_cuda_path()) / ("" if given else "bin/nvcc")
    except RuntimeError:
        return "not compiled, and no CUDA toolkit is installed"
    return None if nvcc.exists() else f"not compiled, and {nvcc} does not exist"
