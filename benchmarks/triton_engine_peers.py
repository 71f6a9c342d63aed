"""The Triton kernels of vLLM and SGLang that attn-triton is timed beside, called as their engines call them: schedules
and scratch space made once a step, outputs that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from attn_core.bench.run import Workload
from attn_core.bench.shapes import Shape

Call = Callable[[], torch.Tensor]

#: vLLM's: batches of fewer programs than the first are split, into so many segments.
VLLM_PROGRAMS, VLLM_SEGMENTS = 128, 16
#: SGLang's default for the most pieces of a request, and for MLA the least keys of one.
SGLANG_SPLITS, SGLANG_MLA_KEYS = 8, 32


def vllm_triton(shape: Shape, work: Workload) -> Call:
    """vLLM's `unified_attention`, for prompts and decode."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    batch, k, v, q, heads = work.batch, work.cache.k_nhd(0), work.cache.v_nhd(0), work.q, shape.num_q_heads
    most = VLLM_PROGRAMS // shape.num_kv_heads
    room = torch.empty(most, heads, VLLM_SEGMENTS, shape.v_head_dim, dtype=torch.float32, device=q.device)
    top, total = (torch.empty(room.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty_like(q)

    def call() -> torch.Tensor:
        unified_attention(
            q, k, v, out, cu_seqlens_q=batch.query_start_loc, max_seqlen_q=max(shape.query_lens),
            seqused_k=batch.seq_lens, max_seqlen_k=max(shape.seq_lens), softmax_scale=work.layer.scale, causal=True,
            window_size=(-1, -1), block_table=batch.page_table, softcap=0, q_descale=None, k_descale=None,
            v_descale=None, seq_threshold_3D=most, num_par_softmax_segments=VLLM_SEGMENTS, softmax_segm_output=room,
            softmax_segm_max=top, softmax_segm_expsum=total,
        )  # fmt: skip
        return out

    return call


def sglang_triton(shape: Shape, work: Workload) -> Call:
    """SGLang's `decode_attention_fwd` and `extend_attention_fwd`, which take the slot of every key."""
    return _sglang_decode(shape, work) if shape.phase == "decode" else _sglang_extend(shape, work)


def _slots(work: Workload, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """indptr [B + 1] and, request by request, the slots of the first keys of each."""
    page = work.cache.page_size
    listed = [
        (torch.tensor(pages, dtype=torch.int64)[:, None] * page + torch.arange(page)).flatten()[:length]
        for pages, length in zip(work.pages, lengths, strict=True)
    ]
    counts = torch.tensor(lengths, dtype=torch.int32)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    return indptr.to(work.q.device), torch.cat(listed).to(work.q.device)


def _pools(shape: Shape, work: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """[slots, Hkv, D] of keys and values."""
    k = work.cache.k_nhd(0).flatten(0, 1)
    return (k, k[..., : shape.v_head_dim]) if shape.kind == "mla" else (k, work.cache.v_nhd(0).flatten(0, 1))


def _sglang_decode(shape: Shape, work: Workload) -> Call:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    q, heads, batch = work.q, shape.num_q_heads, len(shape.seq_lens)
    k, v = _pools(shape, work)
    indptr, slots = _slots(work, shape.seq_lens)
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    most = SGLANG_SPLITS
    if shape.kind == "mla":
        pieces = triton.next_power_of_2(triton.cdiv(max(shape.seq_lens), SGLANG_MLA_KEYS))
        most = max(most, min(triton.next_power_of_2(cores), pieces))
    splits = torch.empty(batch, dtype=torch.int32, device=q.device)
    get_num_kv_splits_triton[(1,)](
        splits, work.batch.seq_lens, batch, 1, heads, shape.num_kv_heads, most, cores,
        MAX_NUM_SEQ=max(256, triton.next_power_of_2(batch)),
    )  # fmt: skip
    logits = torch.empty(batch, heads, most, shape.v_head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, most, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, shape.v_head_dim, dtype=q.dtype, device=q.device)
    options: dict[str, Any] = {"has_mla": shape.kind == "mla", "use_pdl": True}

    def call() -> torch.Tensor:
        decode_attention_fwd(
            q, k, v, out, indptr, slots, logits, lse, splits, most, work.layer.scale, 1.0, 1.0, **options
        )
        return out

    return call


def _sglang_extend(shape: Shape, work: Workload) -> Call:
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    assert work.v is not None, "no prompts of MLA among the shapes"
    q, new_k, new_v, out = work.q, work.k.contiguous(), work.v.contiguous(), torch.empty_like(work.q)
    k, v = _pools(shape, work)
    before = tuple(n - new for n, new in zip(shape.seq_lens, shape.query_lens, strict=True))
    indptr, slots = _slots(work, before)

    def call() -> torch.Tensor:
        extend_attention_fwd(
            q, new_k, new_v, out, k, v, work.batch.query_start_loc, indptr, slots, None, True, None,
            max(shape.query_lens), 1.0, 1.0, sm_scale=work.layer.scale,
        )  # fmt: skip
        return out

    return call
