"""Writes src/attn_ascend/emulator/schemas.json from an installed torch-npu: the schemas of what is called.

Run it where torch-npu imports: a machine with CANN, or the environment that `make ascend-schema` sets up.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
import torch_npu  # noqa: F401 - registers the operators

OPERATORS = {
    "npu::npu_fused_infer_attention_score",
    "npu::npu_fused_infer_attention_score_v2",
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace",
    "npu::npu_scatter_pa_kv_cache",
    "atb::_npu_reshape_and_cache",
    "atb::_npu_reshape_and_cache_siso",
    "atb::_npu_paged_attention",
    "atb::_npu_paged_attention_mla",
}


def vendor_schemas() -> dict[str, object]:
    """The file's content: the wheel's version, and the schemas in the order of their names."""
    schemas = [str(s) for s in torch._C._jit_get_all_schemas() if s.name in OPERATORS]
    return {"torch_npu": version("torch-npu"), "schemas": sorted(schemas)}


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "src/attn_ascend/emulator/schemas.json"
    target.write_text(json.dumps(vendor_schemas(), indent=1) + "\n", encoding="utf-8")
    print(target)
