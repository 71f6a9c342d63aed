"""What the benchmarks of the adapters share: llamas of four sizes, and the manifest of an engine's own kernels."""

from __future__ import annotations

from typing import Any, Final

from attn_core.planning.manifest import Manifest

_TINY: Final = {"vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
#: by name, arguments of LlamaConfig
LLAMAS: Final[dict[str, dict[str, Any]]] = {
    "2 layers of 64": {**_TINY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "2 layers of 128": {**_TINY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "12 layers of 256": {**_TINY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12},
    "SmolLM2-135M's": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def llamas(*names: str) -> dict[str, dict[str, Any]]:
    """Those of LLAMAS, in this order."""
    return {name: LLAMAS[name] for name in names}


def manifest(name: str, summary: str, *, page_sizes: str, kv_layout: str = "NHD") -> Manifest:
    """Of a backend that calls an engine's kernels: prefill and decode of MHA in float32 on a CPU, and nothing else."""
    return Manifest.parse(f"""
schema = 1
name = "{name}"
protocol = ">=1.0,<2"
summary = "{summary}"
[[supports]]
phases = ["prefill", "decode"]
device = "cpu"
kind = "mha"
dtypes = ["float32"]
head_dims = "any"
page_sizes = {page_sizes}
kv_layouts = ["{kv_layout}"]
""")
