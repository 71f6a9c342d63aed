"""From vLLM's CommonAttentionMetadata to a ForwardBatch: no new information, one meaning a field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch, ForwardMode


def batch_of(common: Any, *, verify_tokens: int = 0, exact_lengths: bool = True, spans: bool = False) -> ForwardBatch:
    """The step that ``common`` describes, without the requests and tokens that pad it to a graph's size.

    A step whose requests all have ``verify_tokens`` new tokens, none of them of a prompt, is TARGET_VERIFY.
    ``exact_lengths``: what vLLM calls an upper bound on the host is exact, as it is unless guesses are scheduled
    before they are counted. ``spans``: the model's images are seen both ways. Raises BatchError for a step that is not
    causal.
    """
    if common.causal is not True:
        raise BatchError("a step of vLLM that is not causal", given=common.causal, accepted="causal=True")
    starts = common.query_start_loc_cpu.numpy()
    lens = starts[1:] - starts[:-1]
    requests = int(lens.nonzero()[0][-1]) + 1 if lens.any() else 0
    tokens = int(starts[requests])
    lens = lens[:requests]
    longest = int(lens.max(initial=0))
    ones = requests if longest == 1 else int((lens != 1).argmax()) if requests else 0
    verify = (
        verify_tokens > 1 and requests > 0 and bool((lens == verify_tokens).all()) and not _prompts(common, requests)
    )
    mode = (
        ForwardMode.IDLE if not requests
        else ForwardMode.DECODE if longest == 1
        else ForwardMode.TARGET_VERIFY if verify
        else ForwardMode.MIXED if ones
        else ForwardMode.EXTEND
    )  # fmt: skip
    bound = common.seq_lens_cpu_upper_bound
    return ForwardBatch(
        mode=mode,
        seq_lens=common.seq_lens[:requests],
        query_start_loc=common.query_start_loc[: requests + 1],
        page_table=common.block_table_tensor[:requests],
        slot_mapping=common.slot_mapping[:tokens].long(),
        max_query_len=longest,
        max_seq_len=int(common.max_seq_len),
        num_decodes=ones if mode is ForwardMode.MIXED else 0,
        seq_lens_cpu=None if bound is None or not exact_lengths else bound[:requests].int(),
        query_start_loc_cpu=common.query_start_loc_cpu[: requests + 1],
        spans=_spans(common.mm_req_doc_ranges, requests, common.seq_lens.device) if spans else None,
    )


def _prompts(common: Any, requests: int) -> bool:
    """Whether some request is still at its prompt; unknown counts as none."""
    prefilling = common.is_prefilling
    return prefilling is not None and bool(torch.as_tensor(prefilling)[:requests].any())


def _spans(ranges: Mapping[int, list[tuple[int, int]]] | None, requests: int, device: torch.device) -> Tensor | None:
    """[B, S, 2] int32 of the images' positions; vLLM's ranges hold their last token, ours end before it."""
    if not ranges or not any(ranges.values()):
        return None
    width = max(len(found) for found in ranges.values())
    rows = [[(first, last + 1) for first, last in ranges.get(b, ())] for b in range(requests)]
    padded = [row + [(0, 0)] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int32).reshape(requests, width, 2).to(device)
