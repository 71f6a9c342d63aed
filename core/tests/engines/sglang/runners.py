"""A model runner of SGLang with real pools, layers and batches, and nothing else: enough for an attention backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from torch import Tensor, nn

HEADS, KV_HEADS, WIDTH, CONTEXT, SLOTS = 4, 2, 16, 64, 512
RANK, ROPE = 24, 8


class Layers(nn.Module):
    """Two attention layers, the first with ``window`` tokens before its own, one of them with sinks if asked."""

    def __init__(self, *, window: int = -1, latent: bool = False, **more: Any) -> None:
        super().__init__()
        for i, before in enumerate((window, -1)):
            owner = nn.Module()
            heads, width = (1, RANK + ROPE) if latent else (KV_HEADS, WIDTH)
            owner.attn = RadixAttention(
                HEADS, width, 0.25, heads, i, v_head_dim=RANK if latent else WIDTH, sliding_window_size=before, **more
            )
            setattr(self, f"layer{i}", owner)

    def attention(self, index: int) -> Any:
        return getattr(self, f"layer{index}").attn


def pool_of(kind: str, page_size: int, dtype: torch.dtype) -> Any:
    common: dict[str, Any] = {"page_size": page_size, "dtype": dtype, "device": "cpu", "enable_memory_saver": False}
    if kind == "mla":
        return MLATokenToKVPool(size=SLOTS, kv_lora_rank=RANK, qk_rope_head_dim=ROPE, layer_num=2, **common)
    heads = {"head_num": KV_HEADS, "head_dim": WIDTH}
    if kind == "swa":
        pool = SWAKVPool(
            size=SLOTS, size_swa=SLOTS, swa_attention_layer_ids=[0], full_attention_layer_ids=[1], **heads, **common
        )
        pages = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(SLOTS // page_size)))
        mapping = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
        pool.register_mapping(torch.cat((mapping, torch.tensor([-1]))))
        return pool
    return MHATokenToKVPool(size=SLOTS, layer_num=2, **heads, **common)


def runner(
    model: Layers, kind: str = "mha", *, page_size: int = 1, dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None, backend: str = "attn",
) -> Any:  # fmt: skip
    """Requests lie in pages in no order; row 0 of the table is SGLang's padding."""
    table = ReqToTokenPool(4, CONTEXT, "cpu", False)
    pages = (1 + torch.randperm(SLOTS // page_size - 1))[: 4 * (CONTEXT // page_size)].view(4, -1)
    table.req_to_token[1:] = (pages[:, :, None] * page_size + torch.arange(page_size)).flatten(1)
    return SimpleNamespace(
        model=model,
        token_to_kv_pool=pool_of(kind, page_size, cache or dtype),
        req_to_token_pool=table,
        page_size=page_size,
        device="cpu",
        dtype=dtype,
        kv_cache_dtype=cache or dtype,
        use_mla_backend=kind == "mla",
        is_draft_worker=False,
        prefill_attention_backend_str=backend,
        decode_attention_backend_str=backend,
        kv_index_translator=SimpleNamespace(is_translating=False),
        model_config=SimpleNamespace(
            context_len=CONTEXT, is_local_attention_model=False, hf_config=SimpleNamespace(architectures=["Tiny"])
        ),
    )


def batch(mode: ForwardMode, rows: list[int], new: list[int], lens: list[int], of: Any, **more: Any) -> ForwardBatch:
    """``new`` tokens at the end of requests ``rows`` that are ``lens`` long with them (in verify: without them)."""
    verify = mode == ForwardMode.TARGET_VERIFY
    before = lens if verify else [n - q for n, q in zip(lens, new, strict=True)]
    table = of.req_to_token_pool.req_to_token
    slots = torch.cat([table[r, b : b + q] for r, b, q in zip(rows, before, new, strict=True)])
    return ForwardBatch(
        forward_mode=mode,
        batch_size=len(rows),
        input_ids=torch.zeros(sum(new), dtype=torch.int64),
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens),
        out_cache_loc=slots.long(),
        extend_seq_lens=torch.tensor(new, dtype=torch.int32),
        extend_seq_lens_cpu=list(new),
        extend_prefix_lens=torch.tensor(before, dtype=torch.int32),
        **more,
    )


def states(tokens: int, latent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the model's projections leave them: slices of one tensor, heads flattened."""
    if latent:
        q = torch.randn(tokens, HEADS * (RANK + ROPE))
        k = torch.randn(tokens, 1, RANK + ROPE)
        return q, k, k[..., :RANK]
    sizes = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    q, k, v = torch.randn(tokens, sum(sizes)).split(sizes, dim=-1)
    return q, k.unflatten(1, (KV_HEADS, WIDTH)), v.unflatten(1, (KV_HEADS, WIDTH))
