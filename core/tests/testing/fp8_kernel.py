"""Stand-ins for kernels that compute with an fp8 cache in fp8: queries, keys, probabilities and values in e4m3."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing.reference import Problem, masked_scores, problems
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

#: What such kernels claim, FlashAttention 3 among them, but for graphs.
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "name": "fp8_kernel",
    "protocol": ">=1.0,<2",
    "summary": "Computes in e4m3",
    "supports": [
        {
            "phases": ["prefill", "decode", "verify", "draft"],
            "device": "any",
            "kind": "mha",
            "dtypes": ["bfloat16"],
            "kv_dtypes": ["fp8_e4m3"],
            "quantizes_query": True,
            "head_dims": [{"min": 64, "max": 256, "multiple_of": 16}],
            "page_sizes": "any",
            "kv_layouts": ["NHD", "HND"],
            "features": ["sliding_window", "softcap", "sinks", "lse", "verify_chain", "verify_tree", "cross"],
        }
    ],
}


class Fp8Kernel(TorchNativeBackend):
    """Queries in e4m3 with one scale for each request and KV head, probabilities in e4m3 relative to the maximum."""

    name: ClassVar[str] = "fp8_kernel"
    #: what the largest probability is multiplied with before it is rounded: FlashAttention 3 takes 2^8
    largest_probability: ClassVar[float] = 256.0

    def forward_extend(
        self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        # it writes what is to be written, and gives rows of no request as they must be
        honest = super().forward_extend(q, k, v, layer, batch, **{**options, "out": None, "return_lse": True})
        out, lse = (t.clone() for t in honest)
        rounded = torch.empty_like(q, dtype=torch.float64)
        for first, last in pairwise(batch.query_start_loc.tolist()):
            rounded[first:last] = self.quantized(q[first:last].float(), layer).double()
        layer = self.alter(layer)
        for problem in problems(rounded, layer, batch, self.kv_cache):
            out[problem.rows], lse[problem.rows] = self.attend(problem, layer)
        if options.get("out") is not None:
            out = options["out"].copy_(out)
        return (out, lse) if options.get("return_lse") else out

    def forward_decode(self, *given: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_extend(*given, **options)

    def alter(self, layer: AttentionLayer) -> AttentionLayer:
        """The layer that is computed in place of ``layer``: for faults."""
        return layer

    def quantized(self, q: Tensor, layer: AttentionLayer) -> Tensor:
        """q [n, Hq, D] as e4m3 holds it, with a scale for each KV head."""
        if not q.shape[0]:
            return q
        by_head = q.unflatten(1, (layer.num_kv_heads, -1))
        scale = by_head.abs().amax((0, 2, 3), keepdim=True) / LARGEST
        return ((by_head / scale).to(E4M3).float() * scale).flatten(1, 2)

    def attend(self, problem: Problem, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of one request."""
        scores = masked_scores(problem, layer).float()
        kv_heads, group = scores.shape[:2]
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - torch.where(top.isfinite(), top, 0.0))
        total = weights.sum(-1, keepdim=True)
        if layer.sinks is not None:
            total = total + torch.exp(layer.sinks.float().view(kv_heads, group, 1, 1) - top)
        rounded = (weights * self.largest_probability).to(E4M3).float() / self.largest_probability
        out = torch.einsum("hgnm,mhd->nhgd", rounded, problem.v.float()).flatten(1, 2)
        by_row = total[..., 0].flatten(0, 1).transpose(0, 1)
        tops = top[..., 0].flatten(0, 1).transpose(0, 1)
        return (out / by_row[..., None]).bfloat16(), tops + by_row.log()


class PlainFp8Kernel(Fp8Kernel):
    """The same with unscaled probabilities, and queries as they are."""

    name: ClassVar[str] = "plain_fp8_kernel"
    largest_probability: ClassVar[float] = 1.0

    def quantized(self, q: Tensor, layer: AttentionLayer) -> Tensor:
        return q.to(E4M3).float()
