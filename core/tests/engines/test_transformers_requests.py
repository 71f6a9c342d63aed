"""The decode batches that RequestPages makes ahead are those that ForwardBatch.build makes of the same lists."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from attn_core.engines.transformers.requests import RequestPages
from attn_core.runtime.batch import ForwardBatch, ForwardMode

FIELDS = ("seq_lens", "query_start_loc", "page_table", "slot_mapping", "seq_lens_cpu", "query_start_loc_cpu")


def check(requests: RequestPages, batch: ForwardBatch, seq_lens: list[int]) -> None:
    wanted = ForwardBatch.build(
        ForwardMode.DECODE, query_lens=[1] * len(seq_lens), seq_lens=seq_lens, pages=requests.pages, page_size=4
    )
    for name in FIELDS:
        ours, theirs = getattr(batch, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist(), name
    assert (batch.max_query_len, batch.max_seq_len) == (1, max(seq_lens))


@pytest.mark.parametrize("start", [[5, 5], [5, 2]], ids=["alike", "padded"])
def test_batches_made_ahead_are_those_of_the_lists(start: list[int]) -> None:
    """Over two pages, with a crop and a choice of other requests between."""
    requests = RequestPages(32, 4, lambda source, target: None)
    valid = None if start[0] == start[1] else torch.arange(5)[None] >= 5 - torch.tensor(start)[:, None]
    requests.columns_after(2, 5, valid)
    requests.reserve(start, start)
    requests.append(5, valid)
    ahead = 0
    for i in range(14):
        if i == 7:
            requests.crop(2)
        if i == 10:
            requests.select([1, 0])
        seq_lens = [n + 1 for n in requests.seq_lens()]
        batch = requests.next_decode(2, torch.device("cpu"))
        ahead += batch is not None
        if batch is None:
            requests.reserve(seq_lens, [1, 1])
            batch = requests.decode_batch(seq_lens, torch.device("cpu"))
        check(requests, batch, seq_lens)
        given = None if requests.valid is None else torch.nn.functional.pad(requests.valid, (0, 1), value=True)
        requests.append(1, given)
    assert ahead == (14 if valid is None else 0)
    assert requests.next_decode(3, torch.device("cpu")) is None
