"""A step's data: slots and bounds from host lists, what split() gives, trees, and what check() refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_core.errors import BatchError
from attn_core.runtime.batch import PHASE_OF_MODE, ForwardBatch, ForwardMode, TreeMask, page_table_of, slots_of
from hypothesis import given, settings
from hypothesis import strategies as st


def made(mode: ForwardMode = ForwardMode.EXTEND, **changes: object) -> ForwardBatch:
    fields: dict[str, object] = {
        "query_lens": [3, 1],
        "seq_lens": [5, 9],
        "pages": [[7, 2], [4, 9, 1]],
        "page_size": 4,
    }
    return ForwardBatch.build(mode, **{**fields, **changes})  # type: ignore[arg-type]


def test_new_tokens_are_the_last_of_their_sequence() -> None:
    batch = made()
    assert batch.slot_mapping.tolist() == [7 * 4 + 2, 7 * 4 + 3, 2 * 4, 1 * 4]
    assert batch.query_start_loc.tolist() == [0, 3, 4]
    assert batch.seq_lens.tolist() == [5, 9]
    assert (batch.max_query_len, batch.max_seq_len, batch.batch_size, batch.num_tokens) == (3, 9, 2, 4)
    assert batch.page_table.tolist() == [[7, 2, 0], [4, 9, 1]]
    batch.check(4)


def test_host_copies_say_the_same() -> None:
    batch = made()
    assert batch.seq_lens_cpu is not None
    assert batch.query_start_loc_cpu is not None
    assert torch.equal(batch.seq_lens_cpu, batch.seq_lens)
    assert torch.equal(batch.query_start_loc_cpu, batch.query_start_loc)


def test_a_request_that_is_not_written_has_slots_of_minus_one() -> None:
    assert made(write=[False, True]).slot_mapping.tolist() == [-1, -1, -1, 4]


def test_encoder_tokens_are_written_from_the_first_on() -> None:
    batch = made(encoder_seq_lens=[5, 0], encoder_pages=[[3, 8], []], write_encoder=True)
    assert batch.encoder_slot_mapping is not None
    assert batch.encoder_page_table is not None
    assert batch.encoder_slot_mapping.tolist() == [12, 13, 14, 15, 32]
    assert batch.encoder_page_table.tolist() == [[3, 8], [0, 0]]
    assert batch.max_encoder_seq_len == 5


def test_spans_are_filled_up_with_empty_ones() -> None:
    batch = made(spans=[[(0, 2), (3, 5)], []])
    assert batch.spans is not None
    assert batch.spans.tolist() == [[[0, 2], [3, 5]], [[0, 0], [0, 0]]]


def test_a_batch_of_nobody() -> None:
    batch = made(query_lens=[], seq_lens=[], pages=[])
    assert (batch.batch_size, batch.num_tokens, batch.max_seq_len) == (0, 0, 0)
    batch.check(4)


@settings(deadline=None)
@given(
    page_size=st.integers(1, 9),
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5),
)
def test_slots_are_where_the_page_table_says(page_size: int, lengths: list[tuple[int, int]]) -> None:
    query = [min(pair) for pair in lengths]
    seq = [max(pair) for pair in lengths]
    ids = iter(range(1, 1000))
    pages = [[next(ids) for _ in range(-(-n // page_size))] for n in seq]
    batch = ForwardBatch.build(
        ForwardMode.EXTEND, query_lens=query, seq_lens=seq, pages=pages, page_size=page_size
    )  # fmt: skip
    batch.check(page_size)
    slots = iter(batch.slot_mapping.tolist())
    for b, (n, length) in enumerate(zip(query, seq, strict=True)):
        for position in range(length - n, length):
            assert next(slots) == int(batch.page_table[b, position // page_size]) * page_size + position % page_size


IMPOSSIBLE: list[tuple[str, dict[str, object], str]] = [
    ("more new tokens than tokens", {"query_lens": [6, 1]}, "6 new tokens in a sequence of 5"),
    ("too few pages", {"pages": [[7], [4, 9, 1]]}, "1 pages of 4 for 5 tokens"),
    ("lists of different lengths", {"seq_lens": [5]}, "2 query lengths, 1 sequence lengths"),
    ("a decode of three", {"mode": ForwardMode.DECODE}, "DECODE with query lengths"),
]


@pytest.mark.parametrize(("why", "changes", "message"), IMPOSSIBLE, ids=[row[0] for row in IMPOSSIBLE])
def test_lists_that_make_no_step_are_refused(why: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        made(**changes)  # type: ignore[arg-type]


BROKEN: list[tuple[str, Callable[[ForwardBatch], object], str]] = [
    ("starts", lambda b: setattr(b, "query_start_loc", b.query_start_loc[:2]), "2 entries for 2 requests"),
    ("slots", lambda b: setattr(b, "slot_mapping", b.slot_mapping[:3]), "slot_mapping has 3 tokens"),
    ("lengths", lambda b: b.seq_lens.fill_(2), "sequence lengths"),
    ("max_query_len", lambda b: setattr(b, "max_query_len", 2), "max_query_len 2"),
    ("max_seq_len", lambda b: setattr(b, "max_seq_len", 8), "max_seq_len 8"),
    ("mode", lambda b: setattr(b, "mode", ForwardMode.DECODE), "DECODE with query lengths"),
    ("decodes in front", lambda b: (setattr(b, "mode", ForwardMode.MIXED), setattr(b, "num_decodes", 1)), "in front"),
    ("page table", lambda b: setattr(b, "page_table", b.page_table[:, :2]), "page_table"),
    ("dtype", lambda b: setattr(b, "seq_lens", b.seq_lens.long()), "dtypes"),
]


@pytest.mark.parametrize(("why", "break_it", "message"), BROKEN, ids=[row[0] for row in BROKEN])
def test_check_finds_what_breaks_the_contract(
    why: str, break_it: Callable[[ForwardBatch], object], message: str
) -> None:
    batch = made()
    break_it(batch)
    with pytest.raises(BatchError, match=message):
        batch.check(4)


def test_a_mixed_batch_splits_into_its_decodes_and_the_rest() -> None:
    batch = ForwardBatch.build(
        ForwardMode.MIXED,
        query_lens=[1, 1, 4],
        seq_lens=[5, 9, 4],
        pages=[[1, 2], [3, 4, 5], [6]],
        page_size=4,
        spans=[[], [], [(0, 2)]],
        encoder_seq_lens=[1, 2, 3],
        encoder_pages=[[7], [8], [9]],
    )
    assert batch.num_decodes == 2
    decode, extend = batch.split()
    assert (decode.mode, extend.mode) == (ForwardMode.DECODE, ForwardMode.EXTEND)
    assert decode.slot_mapping.tolist() == batch.slot_mapping[:2].tolist()
    assert extend.slot_mapping.tolist() == batch.slot_mapping[2:].tolist()
    assert extend.query_start_loc.tolist() == [0, 4]
    assert extend.query_start_loc_cpu is not None
    assert extend.query_start_loc_cpu.tolist() == [0, 4]
    assert decode.max_query_len == 1
    assert extend.spans is not None
    assert extend.spans.tolist() == [[[0, 2]]]
    assert extend.encoder_seq_lens is not None
    assert extend.encoder_seq_lens.tolist() == [3]
    assert decode.page_table.data_ptr() == batch.page_table.data_ptr(), "views, not copies"
    decode.check(4)
    extend.check(4)


def test_only_the_leading_single_tokens_are_decodes() -> None:
    batch = made(ForwardMode.MIXED, query_lens=[3, 1])
    assert batch.num_decodes == 0
    decode, extend = batch.split()
    assert (decode.batch_size, extend.batch_size) == (0, 2)


def test_other_modes_do_not_split() -> None:
    with pytest.raises(BatchError, match="mode EXTEND"):
        made().split()


def test_every_mode_but_idle_has_a_phase() -> None:
    assert set(PHASE_OF_MODE) == set(ForwardMode) - {ForwardMode.IDLE}


def test_a_tree_sees_ancestors_and_counts_depth() -> None:
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0, 1, -1]]))
    assert tree.num_draft_tokens == 5
    assert tree.visible[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert tree.depths().tolist() == [[0, 1, 1, 2, 0]]


def test_trees_of_a_batch_are_their_own() -> None:
    both = TreeMask.from_parents(torch.tensor([[-1, 0, 1], [-1, 0, 0]]))
    for b, parents in enumerate(([-1, 0, 1], [-1, 0, 0])):
        assert torch.equal(both.visible[b], TreeMask.from_parents(torch.tensor([parents])).visible[0])


def test_slots_and_tables_of_nothing() -> None:
    assert slots_of([3], range(0), 4) == []
    assert page_table_of([[], []], "cpu").tolist() == [[0], [0]]
    assert replace(made(), plan_state=1).plan_state == 1
