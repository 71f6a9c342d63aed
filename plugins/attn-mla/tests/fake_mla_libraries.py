"""Stand-ins for flash_mla and for FlashInfer's TRT-LLM decode: their conventions in plain torch, strict about limits.

Kept from the real ones: FlashMLA wants pages of 64 and ``use_legacy`` for its dense kernel, fills its schedule at the
first call and silently reuses it for other lengths, and gives +inf as log-sum-exp of a row without keys; TRT-LLM's
log-sum-exp is in base 2 unless asked otherwise, its pages are of 32 or 64 tokens, its workspace begins
zeroed, and it has no kernels for more than 64 and fewer than 128 heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass
class Schedule:
    """Made empty; the first call fills in what it was made for."""

    made_for: list[int] | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


class FakeLibraries:
    """``calls``: (function, keyword arguments); ``schedules``: every schedule; ``legacy``: whether it was built."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.schedules: list[Schedule] = []
        self.legacy = True
        self.fail: Exception | None = None

    def modules(self) -> dict[str, ModuleType]:
        flash_mla, flashinfer, mla = (ModuleType(name) for name in ("flash_mla", "flashinfer", "flashinfer.mla"))
        flash_mla.flash_mla_with_kvcache = self._flashmla()
        flash_mla.get_mla_metadata = self._new_schedule
        flash_mla.get_mla_decoding_metadata = self._fp8_schedule
        flash_mla.has_legacy = lambda: self.legacy
        mla.trtllm_batch_decode_with_kv_cache_mla = self._trtllm()
        flashinfer.mla = mla
        return {"flash_mla": flash_mla, "flashinfer": flashinfer, "flashinfer.mla": mla}

    def _new_schedule(self, *args, **kwargs):
        self.schedules.append(Schedule())
        return self.schedules[-1], None

    def _fp8_schedule(self, seqlens_k, num_q_tokens_per_head_k, h_k, is_fp8_kvcache=False, use_legacy=False):
        assert is_fp8_kvcache
        assert use_legacy
        assert h_k == 1
        return seqlens_k.clone(), torch.tensor(num_q_tokens_per_head_k)

    def _note(self, name, arguments):
        self.calls.append((name, arguments))
        if self.fail is not None:
            raise self.fail

    def _flashmla(self):
        def flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
            softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, use_legacy=False, descale_q=None,
            descale_k=None,
        ):  # fmt: skip
            arguments = dict(locals())
            arguments.pop("self", None)
            self._note("flashmla", arguments)
            assert use_legacy, "Sparse attention is required: `indices` must be provided."
            assert k_cache.shape[1:] == (64, 1, 576)
            assert q.dtype == k_cache.dtype
            assert block_table.dtype == cache_seqlens.dtype == torch.int32
            lens = cache_seqlens.tolist()
            if is_fp8_kvcache:
                assert k_cache.dtype == torch.float8_e4m3fn
                assert descale_q.shape == descale_k.shape == (1,)
                assert tile_scheduler_metadata.tile_scheduler_metadata.tolist() == lens, "a schedule of other lengths"
                assert int(tile_scheduler_metadata.num_splits) == q.shape[1] * q.shape[2]
                q = (q.float() * descale_q).bfloat16()
                k_cache = k_cache.float() * descale_k
            else:
                assert descale_q is descale_k is None, "descales apply to the dense fp8 path only"
                made_for = tile_scheduler_metadata.made_for
                if made_for is None:
                    tile_scheduler_metadata.made_for = lens
                assert made_for in (None, lens), "a schedule of other lengths gives wrong results without a word"
            out, lse = decode(q, k_cache.squeeze(2), block_table, cache_seqlens, head_dim_v, softmax_scale, causal)
            return out, torch.where(lse == float("-inf"), float("inf"), lse)

        return flash_mla_with_kvcache

    def _trtllm(self):
        def trtllm_batch_decode_with_kv_cache_mla(
            query, kv_cache, workspace_buffer, qk_nope_head_dim, kv_lora_rank, qk_rope_head_dim, block_tables,
            seq_lens, max_seq_len, out=None, bmm1_scale=1.0, bmm2_scale=1.0, backend="auto", lse=None,
            return_lse=False, return_lse_base=None,
        ):  # fmt: skip
            arguments = dict(locals())
            arguments.pop("self", None)
            self._note("trtllm", arguments)
            assert backend == "trtllm-gen"
            assert (qk_nope_head_dim, kv_lora_rank, qk_rope_head_dim) == (128, 512, 64)
            assert kv_cache.shape[1] in (32, 64)
            assert kv_cache.shape[2] == 576
            assert not workspace_buffer.any(), "counters must start at zero"
            assert max_seq_len >= int(seq_lens.max())
            assert query.dtype == kv_cache.dtype
            assert not 64 < query.shape[2] < 128, "trtllm-gen MLA decode does not support 64 < num_heads_q < 128"
            assert isinstance(bmm1_scale, Tensor) == isinstance(bmm2_scale, Tensor), "two numbers, or two tensors"
            if isinstance(bmm1_scale, Tensor):
                assert bmm1_scale.dtype == bmm2_scale.dtype == torch.float32
                bmm1_scale, bmm2_scale = float(bmm1_scale), float(bmm2_scale)
            assert out is None or out.dtype == torch.bfloat16
            found, natural = decode(
                query.bfloat16(), kv_cache, block_tables, seq_lens, kv_lora_rank, bmm1_scale, query.shape[1] > 1
            )
            found = found * bmm2_scale if out is None else out.copy_(found * bmm2_scale)
            if not return_lse:
                return found
            rows = natural.transpose(1, 2).flatten(0, 1)
            lse.copy_(rows if return_lse_base == "basee" else rows / math.log(2))
            return found, lse

        return trtllm_batch_decode_with_kv_cache_mla


def decode(q: Tensor, cache: Tensor, table: Tensor, lens: Tensor, width: int, scale: float, causal: bool):
    """out [B, S, H, width] and lse [B, H, S], natural; causal aligns the last query with the last key."""
    batch, queries, heads, _ = q.shape
    out = torch.zeros(batch, queries, heads, width, dtype=q.dtype)
    lse = torch.full((batch, heads, queries), float("-inf"))
    page = cache.shape[1]
    for b in range(batch):
        count = int(lens[b])
        position = torch.arange(count)
        latent = cache[table[b].long()[position // page], position % page].double()
        scores = torch.einsum("qhd,kd->hqk", q[b].double(), latent) * scale
        if causal:
            seen = position[None, :] <= torch.arange(queries)[:, None] + count - queries
            scores = scores.masked_fill(~seen, float("-inf"))
        if count:
            lse[b] = torch.logsumexp(scores, -1).float()
            weights = torch.softmax(scores, -1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
            out[b] = torch.einsum("hqk,kd->qhd", weights, latent[:, :width]).to(q.dtype)
    return out, lse
