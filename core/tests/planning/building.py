"""Manifests, configs and installations made for one test: short to write, complete to read."""

from __future__ import annotations

from typing import Any

from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.discovery import BackendRef, Installed, Problem
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System

HOPPER = System("cuda", "sm_90", dists={})
BLACKWELL = System("cuda", "sm_100", dists={})
CPU = System("cpu", dists={})

MHA = LayerKind(num_q_heads=32, num_kv_heads=8, qk_head_dim=128, v_head_dim=128)
MLA = LayerKind(num_q_heads=128, num_kv_heads=1, qk_head_dim=576, v_head_dim=512, kind="mla", scale=192**-0.5)
TOWER = LayerKind(num_q_heads=16, num_kv_heads=16, qk_head_dim=72, v_head_dim=72, ragged=True, causal=False)


def config(*kinds: LayerKind, **serving: Any) -> AttentionConfig:
    """A model of these layer kinds (default: one plain MHA kind)."""
    return AttentionConfig(kinds or (MHA,), **serving)


def clause(**changes: Any) -> dict[str, Any]:
    """A clause of plain MHA on CUDA; None takes a key away."""
    plain: dict[str, Any] = {
        "phases": ["prefill", "decode"],
        "device": "cuda",
        "kind": "mha",
        "dtypes": ["float16", "bfloat16"],
        "head_dims": [[128, 128]],
        "page_sizes": [16, 32],
        "kv_layouts": ["NHD"],
    }
    return {key: value for key, value in {**plain, **changes}.items() if value is not None}


def mla_clause(**changes: Any) -> dict[str, Any]:
    """A clause of absorbed MLA on CUDA."""
    return clause(**{"kind": "mla", "head_dims": [[576, 512]], "page_sizes": [64], "kv_layouts": None, **changes})


def manifest(name: str = "one", /, *clauses: dict[str, Any], **changes: Any) -> Manifest:
    """A manifest with these clauses (default: plain MHA)."""
    data = {
        "schema": 1,
        "name": name,
        "protocol": ">=1.0,<2",
        "summary": "made for a test",
        "supports": list(clauses) or [clause()],
        **changes,
    }
    return Manifest.parse({key: value for key, value in data.items() if value is not None}, source=f"{name}.toml")


def ref(
    name: str, /, *clauses: dict[str, Any], dist: str | None = None, ambiguous: bool = False, **changes: Any
) -> BackendRef:
    """An installed backend with these clauses."""
    dist = dist or f"attn-{name.replace('_', '-')}"
    listed = f"{name}@{dist}" if ambiguous else name
    made = manifest(name, *clauses, **changes)
    return BackendRef(name, dist, "1.0", f"{name}:Backend", made, listed, ambiguous=ambiguous)


def broken(name: str, message: str = "there is no manifest", code: str = "broken_plugin") -> Problem:
    """An entry point that cannot be used."""
    return Problem(name, f"attn-{name}", "1.0", name, code, message)


def installed(*items: BackendRef | Problem) -> Installed:
    """An installation of exactly these."""
    return Installed(
        tuple(item for item in items if isinstance(item, BackendRef)),
        tuple(item for item in items if isinstance(item, Problem)),
    )
