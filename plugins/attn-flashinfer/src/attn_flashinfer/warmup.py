"""Steps of one short request: planning them builds the modules that a config will need, and no step waits for one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache


def smallest_steps(config: AttentionConfig, cache: KVCache) -> Iterator[ForwardBatch]:
    """A batch for each way in which ``config`` can be asked to run: what they name is never read."""
    drafts = config.speculative_num_draft_tokens
    yield _step(cache, ForwardMode.EXTEND, 2, spans=[[(0, 2)]] if config.bidirectional_spans else None)
    yield _step(cache, ForwardMode.DECODE, 1)
    if config.bidirectional_spans:
        yield _step(cache, ForwardMode.EXTEND, 2)
    if drafts:
        tree = None
        if config.speculative_eagle_topk > 1:
            alone = torch.eye(drafts, dtype=torch.bool, device=cache.device)
            tree = TreeMask(alone.repeat(1, 1, 1))
        yield _step(cache, ForwardMode.TARGET_VERIFY, drafts, tree=tree)


def _step(
    cache: KVCache,
    mode: ForwardMode,
    query: int,
    *,
    tree: TreeMask | None = None,
    spans: list[list[tuple[int, int]]] | None = None,
) -> ForwardBatch:
    length = max(query, 2)
    pages = [1] * -(-length // cache.page_size)
    return ForwardBatch.build(
        mode,
        query_lens=[query],
        seq_lens=[length],
        pages=[pages],
        page_size=cache.page_size,
        device=cache.device,
        tree=tree,
        spans=spans,
        encoder_seq_lens=[1],
        encoder_pages=[[1]],
    )
