"""MHA and GQA with ATB's paged attention alone, without the fused operator: every query as a request."""

from __future__ import annotations

from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_ascend.latent import MAX_ATB_REQUESTS, expanded
from attn_ascend.operators import Operators
from attn_ascend.step import Step


def attend_paged(
    operators: Operators, q: Tensor, key: Tensor, value: Tensor, layer: AttentionLayer, step: Step
) -> Tensor:
    """out [T, Hq, D], causal, over key, value [pages, page_size, Hkv, D]; all contiguous."""
    out = q.new_empty(q.shape)
    for run in step.lengths.runs():
        rows, requests = run.rows, expanded(step, run)
        for start in range(rows.start, rows.stop, MAX_ATB_REQUESTS):
            part = slice(start, min(start + MAX_ATB_REQUESTS, rows.stop))
            own = slice(part.start - rows.start, part.stop - rows.start)
            operators.paged_attention(
                q[part], key, value, layer.scale, requests.table[own], requests.lengths[own], out[part]
            )
    return out
