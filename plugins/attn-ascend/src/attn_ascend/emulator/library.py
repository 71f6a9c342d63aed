"""Puts the CPU kernels behind the vendor's schemas: an imported torch-npu's, or those written down from it."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch.library import Library

from attn_ascend.emulator import fused, paged, writing

_KERNELS = {
    "npu::npu_fused_infer_attention_score": fused.fused_attention(1),
    "npu::npu_fused_infer_attention_score.out": fused.fused_attention_out(1),
    "npu::npu_fused_infer_attention_score_v2": fused.fused_attention(2),
    "npu::npu_fused_infer_attention_score_v2.out": fused.fused_attention_out(2),
    "npu::_npu_fused_infer_attention_score_get_max_workspace": fused.workspace,
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace": fused.workspace,
    "npu::npu_scatter_pa_kv_cache": writing.scatter_pa_kv_cache,
    "atb::_npu_reshape_and_cache": writing.reshape_and_cache,
    "atb::_npu_reshape_and_cache_siso": writing.reshape_and_cache_siso,
    "atb::_npu_paged_attention": paged.paged_attention,
    "atb::_npu_paged_attention_mla": paged.paged_latent_attention,
}
_libraries: list[Library] = []


def vendored() -> dict[str, Any]:
    """The schemas written down from a wheel: {"torch_npu": its version, "schemas": [...]}."""
    text = files("attn_ascend.emulator").joinpath("schemas.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def install() -> str:
    """Register the kernels for CPU tensors, once in a process; returns the version of the schemas they stand behind.

    torch-npu's own schemas are used where it is imported; nothing is done to its kernels for cards.
    """
    written = vendored()
    if "torch_npu" in sys.modules:
        version: str = sys.modules["torch_npu"].__version__
    else:
        version = written["torch_npu"]
        for schema in written["schemas"]:
            namespace, _, rest = schema.partition("::")
            _library(namespace, "FRAGMENT").define(rest)  # type: ignore[no-untyped-call]
    for name, kernel in _KERNELS.items():
        namespace, _, rest = name.partition("::")
        _library(namespace, "IMPL").impl(rest, kernel, "CPU")  # type: ignore[no-untyped-call]
    return version


def _library(namespace: str, kind: str) -> Library:
    library = Library(namespace, kind)  # type: ignore[no-untyped-call]
    _libraries.append(library)
    return library


def is_installed() -> bool:
    """Whether the schemas are there, whoever brought them."""
    return hasattr(torch.ops.npu, "npu_fused_infer_attention_score_v2")
