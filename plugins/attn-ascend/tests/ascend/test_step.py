"""A batch as lengths on the host, runs of requests, and tables: what every call is made from."""

from __future__ import annotations

import pytest
import torch
from attn_ascend.latent import _pieces, expanded
from attn_ascend.step import Lengths, Run, Step, check_size, host_lengths, step_of
from attn_core.errors import BatchError, CapacityError
from attn_core.runtime.batch import ForwardBatch, ForwardMode


def batch(query_lens: list[int], seq_lens: list[int]) -> ForwardBatch:
    pages = [[i + 1] * -(-n // 128) for i, n in enumerate(seq_lens)]
    return ForwardBatch.build(ForwardMode.EXTEND, query_lens=query_lens, seq_lens=seq_lens, pages=pages, page_size=128)


def test_query_lengths_add_up_and_key_lengths_do_not() -> None:
    lengths = host_lengths(batch([2, 0, 3], [130, 5, 3]))
    assert (lengths.query_ends, lengths.keys) == ([2, 2, 5], [130, 5, 3])


def test_requests_of_one_length_that_follow_each_other_are_a_run() -> None:
    assert Lengths([1, 1, 4, 0, 4, 1], [9] * 6).runs() == [
        Run(0, 2, 1, 0), Run(2, 3, 4, 2), Run(4, 5, 4, 6), Run(5, 6, 1, 10),
    ]  # fmt: skip


def test_rows_of_runs_cover_every_token_once() -> None:
    lengths = Lengths([3, 3, 0, 1, 1, 1, 7], [9] * 7)
    rows = [row for run in lengths.runs() for row in range(*run.rows.indices(100))]
    assert rows == list(range(16))


def test_a_padded_request_is_given_as_many_keys_as_queries() -> None:
    padded = batch([4, 4], [130, 4])
    padded.seq_lens_cpu = torch.tensor([130, 1], dtype=torch.int32)
    assert host_lengths(padded).keys == [130, 4]


def test_tables_and_slots_are_what_the_operators_take() -> None:
    wide = batch([2, 3], [130, 3])
    wide.page_table = torch.cat([wide.page_table, wide.page_table], 1)[:, :2]
    step = step_of(wide)
    assert (step.table.dtype, step.slots.dtype) == (torch.int32, torch.int32)
    assert step.table.is_contiguous()
    assert step.slots.tolist() == wide.slot_mapping.tolist()


def test_a_replay_never_waits_for_the_device() -> None:
    there = batch([1], [5])
    there.seq_lens_cpu = None
    with pytest.raises(BatchError, match="a batch without seq_lens_cpu"):
        host_lengths(there, synchronise=False)


@pytest.mark.parametrize(("requests", "keys"), [(4097, 1), (1, 262145)])
def test_more_than_a_call_takes_is_refused(requests: int, keys: int) -> None:
    with pytest.raises(CapacityError, match="in one step"):
        check_size([1] * requests, [keys] * requests)
    check_size([1] * 4096, [262144] * 4096)


def test_expanded_queries_see_one_key_more_each() -> None:
    table = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    step = Step(Lengths([3, 3], [130, 3]), table, torch.zeros(6, dtype=torch.int32))
    made = expanded(step, Run(0, 2, 3, 0))
    assert made.lengths.tolist() == [128, 129, 130, 1, 2, 3]
    assert made.table.tolist() == [[1, 2]] * 3 + [[3, 0]] * 3
    assert expanded(step, Run(0, 2, 3, 0)) is made


@pytest.mark.parametrize("queries", [2, 16, 17, 31, 32, 33, 100])
def test_pieces_of_a_long_request_are_causal_and_never_single(queries: int) -> None:
    pieces = _pieces(queries, 200)
    assert sum(n for n, _ in pieces) == queries
    assert all(2 <= n <= 16 for n, _ in pieces)
    ends = [sum(n for n, _ in pieces[: i + 1]) for i in range(len(pieces))]
    assert [keys for _, keys in pieces] == [200 - queries + end for end in ends]
