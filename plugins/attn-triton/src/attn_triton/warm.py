"""Steps that need every kernel a config can need: run once to compile them, on the device or ahead of time for another
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import TORCH_DTYPES
from attn_core.runtime.layer import AttentionLayer

from attn_triton.route import FEW_ROWS

if TYPE_CHECKING:
    from attn_triton.backend import TritonBackend

#: Kernels are chosen by how full a batch makes the chip, and the schedule's by the next power of two of its size: every
#: small batch, and the least and the largest for each of those powers.
BATCH_SIZES = (*range(1, 49), 64, 65, 128, 129, 256)
#: Keys of a request: every number of pieces that a merge is compiled for, and what is long on any chip.
KEYS = (1, 128, 256, 512, 1024, 16384, 1 << 20)
#: Tokens of a step of many short prompts, at most: more of them ask for no other kernel and take memory.
MOST_TOKENS = 4096
#: Prompts of one length, and of lengths so different that row blocks are mapped: by the next power of two of how many.
PROMPTS = ((128, 128), *((1,) * (size - 1) + (384,) for size in (2, 4, 8, 16, 32, 64, 128, 256)))


def warm_batches(config: AttentionConfig, page_size: int, device: torch.device) -> Iterator[ForwardBatch]:
    """Batches over the null page, nothing written: decode, verify, prompts, with and without lengths that the host
    knows. They are long on the host only: on the device every request has a key or few, so that they cost nothing.
    Prompts with few rows (the rest of one that was cached, a chunk) are split over programs like a decode step.
    """
    for size in BATCH_SIZES:
        yield from _as_known(_batch(ForwardMode.DECODE, (1,) * size, page_size, config, device))
    for new in few_tokens(config):
        for size in (size for size in BATCH_SIZES if size * new <= MOST_TOKENS):
            yield from _as_known(_batch(ForwardMode.EXTEND, (new,) * size, page_size, config, device))
    for prompts in PROMPTS:
        batch = _batch(ForwardMode.EXTEND, prompts, page_size, config, device)
        yield batch
        if config.bidirectional_spans:
            batch.spans = torch.zeros(len(prompts), 1, 2, dtype=torch.int32, device=device)
            yield batch
    drafts = config.speculative_num_draft_tokens
    for size in BATCH_SIZES if drafts else ():
        batch = _batch(ForwardMode.TARGET_VERIFY, (drafts,) * size, page_size, config, device)
        if config.speculative_eagle_topk > 1:
            parents = torch.arange(-1, drafts - 1, device=device)
            batch.tree = TreeMask.from_parents(parents.repeat(size, 1))
        yield from _as_known(batch)
        yield _batch(ForwardMode.DRAFT_EXTEND, (drafts,) * size, page_size, config, device)


def few_tokens(config: AttentionConfig) -> list[int]:
    """New tokens of a request, a number for every power of two of rows up to FEW_ROWS that some layer has with them."""
    least = min((kind.num_q_heads // kind.num_kv_heads for kind in config.cached_kinds), default=FEW_ROWS + 1)
    return [1 << n for n in range(FEW_ROWS.bit_length()) if least << n <= FEW_ROWS]


def _as_known(batch: ForwardBatch) -> Iterator[ForwardBatch]:
    """``batch`` as requests of many lengths: alike, unlike, and unknown to the host."""
    least, size = batch.max_seq_len, batch.batch_size
    for keys in KEYS:
        batch.max_seq_len = batch.max_encoder_seq_len = max(least, keys)
        alike = torch.full((size,), batch.max_seq_len, dtype=torch.int32)
        unlike = torch.where(torch.arange(size) == 0, batch.max_seq_len, least).to(torch.int32)
        for lengths in (alike, unlike, None) if size > 1 else (alike,):
            batch.seq_lens_cpu = batch.encoder_seq_lens_cpu = lengths
            yield batch


def layers_of(config: AttentionConfig) -> list[AttentionLayer]:
    """One layer of each cached kind of ``config``; sinks are zeros."""
    return [
        AttentionLayer.of_kind(
            kind,
            kind.layer_ids[0] if kind.layer_ids else 0,
            sinks=torch.zeros(kind.num_q_heads) if kind.sinks else None,
        )
        for kind in config.cached_kinds
    ]


def warm_layer(backend: TritonBackend, config: AttentionConfig, kind: LayerKind, batch: ForwardBatch) -> None:
    """Every call that an engine may make of a layer of ``kind`` in ``batch``, on zeros."""
    dtype, device = TORCH_DTYPES[config.dtype], batch.device
    sinks = torch.zeros(kind.num_q_heads, device=device) if kind.sinks else None
    q = torch.zeros(batch.num_tokens, kind.num_q_heads, kind.qk_head_dim, dtype=dtype, device=device)
    k = torch.zeros(batch.num_tokens, kind.num_kv_heads, kind.qk_head_dim, dtype=dtype, device=device)
    v = torch.zeros(batch.num_tokens, kind.num_kv_heads, kind.v_head_dim, dtype=dtype, device=device)
    layer = AttentionLayer.of_kind(kind, kind.layer_ids[0] if kind.layer_ids else 0, sinks=sinks)
    for return_lse in (False, True) if config.lse else (False,):
        if not kind.ragged:
            values = None if kind.kind == "mla" else v
            backend.forward(q, k, values, layer, batch, return_lse=return_lse)
        elif batch.mode is ForwardMode.EXTEND:
            starts = batch.query_start_loc
            backend.forward_ragged(
                q, k, v, layer, query_start_loc=starts, key_start_loc=starts, max_query_len=batch.max_query_len,
                max_key_len=batch.max_query_len, causal=kind.causal, return_lse=return_lse,
            )  # fmt: skip


def _batch(
    mode: ForwardMode, query_lens: tuple[int, ...], page_size: int, config: AttentionConfig, device: torch.device
) -> ForwardBatch:
    longest = max(query_lens)
    pages = [[0] * -(-longest // page_size)] * len(query_lens)
    cross = any(kind.cross for kind in config.layers)
    batch = ForwardBatch.build(
        mode,
        query_lens=query_lens,
        seq_lens=query_lens,
        pages=pages,
        page_size=page_size,
        device=device,
        write=(False,) * len(query_lens),
        encoder_seq_lens=[1] * len(query_lens) if cross else None,
        encoder_pages=[[0]] * len(query_lens) if cross else None,
    )
    if cross:
        batch.encoder_slot_mapping = torch.full_like(batch.slot_mapping, -1)
    return batch
