"""Plans that mix libraries over one cache: prefill by one, decode by another, compared with the oracle."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import plan
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.witness import Witness
from attn_core.testing.reference import problems
from attn_core.testing.tolerances import Precision, expect

MHA = LayerKind(32, 8, 128, 128, layer_ids=(0,))
LATENT = LayerKind(16, 1, 576, 512, kind="mla", scale=192**-0.5, layer_ids=(0,))
PLANS = (
    (MHA, {"prefill": "fa3", "decode": "flashinfer"}),
    (MHA, {"prefill": "flashinfer", "decode": "fa3"}),
    (replace(MHA, sliding_window=100), {"prefill": "fa3", "decode": "flashinfer"}),
    (LATENT, {"prefill": "flashinfer_mla", "decode": "flashmla"}),
    (LATENT, "flashmla"),
)


def run_mixed() -> list[dict[str, Any]]:
    """Each plan: a prompt, more of it, a mixed batch, decodes; what ran, and the largest error over its tolerance."""
    found = []
    for kind, names in PLANS:
        try:
            found.append(_one(kind, names))
        except Exception:
            found.append({"plan": str(names), "raised": traceback.format_exc(limit=5)})
        print(f"[mixed] {found[-1]}", flush=True)
    return found


def _one(kind: LayerKind, names: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    config = AttentionConfig(layers=(kind,), max_context_len=4096)
    chosen = plan(config, backend=names, fallback="allow")
    page = chosen.config.page_size
    assert page is not None
    cache = KVCache.allocate(chosen.config, num_pages=256, device="cuda")
    router = build(chosen, cache)
    witness = Witness(router)
    layer = AttentionLayer.of_kind(kind, 0)
    pages = [list(range(1 + 60 * b, 61 + 60 * b)) for b in range(3)]
    steps = [
        (ForwardMode.EXTEND, [300, 40, 7], [300, 40, 7]),
        (ForwardMode.EXTEND, [100, 1, 64], [400, 41, 71]),
        (ForwardMode.MIXED, [1, 1, 90], [401, 42, 161]),
        (ForwardMode.DECODE, [1, 1, 1], [402, 43, 162]),
        (ForwardMode.DECODE, [1, 1, 1], [403, 44, 163]),
    ]
    worst = 0.0
    for mode, query, lens in steps:
        batch = ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=page, device="cuda")
        q, k, v = (
            torch.randn(batch.num_tokens, heads, width, device="cuda").bfloat16()
            for heads, width in (
                (kind.num_q_heads, kind.qk_head_dim),
                (kind.num_kv_heads, kind.qk_head_dim),
                (kind.num_kv_heads, kind.v_head_dim),
            )
        )
        witness.backend.init_forward_metadata(batch)
        out = witness.backend.forward(q, k, None if kind.kind == "mla" else v, layer, batch)
        wanted = expect(problems(q, layer, batch, cache), q, layer, Precision.of(torch.bfloat16))
        worst = max(worst, float(((out.double().to(wanted.out.device) - wanted.out).abs() / wanted.value).max()))
    ran = {phase: part.backend.name for phase, part in chosen.phases.items()}
    return {
        "plan": ran, "page_size": page, "layout": chosen.config.kv_layout, "witnessed": sorted(witness.names),
        "worst_error_over_tolerance": worst, "right": worst <= 1.0,
    }  # fmt: skip
