"""Windows, causality and everything, in sparse modes: which keys a query sees, against the contract's own sentence."""

from __future__ import annotations

import pytest
import torch
from attn_ascend.emulator.maths import sight
from attn_ascend.sight import ALL_KEYS, CAUSAL, UNBOUNDED, Sight, compressed_mask, sight_of


@pytest.mark.parametrize("window", [None, 1, 2, 7, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 4)])
def test_a_query_sees_its_window_and_nothing_else(queries: int, keys: int, window: int | None) -> None:
    found = sight_of(True, window, [(queries, keys)])
    seen = sight(found.mode, found.pre_tokens, found.next_tokens, queries, keys)
    assert seen is not None
    for i in range(queries):
        position = keys - queries + i
        wanted = range(0 if window is None else max(0, position - window + 1), position + 1)
        assert seen[i].nonzero().flatten().tolist() == list(wanted)


def test_a_window_of_w_keys_is_w_minus_1_tokens_before() -> None:
    assert sight_of(True, 16, [(3, 9)]) == Sight(4, 15, 0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (4, 9), (9, 4)])
def test_without_causality_every_key_is_seen(queries: int, keys: int) -> None:
    found = sight_of(False, None, [(queries, keys)])
    seen = sight(found.mode, found.pre_tokens, found.next_tokens, queries, keys)
    assert seen is not None
    assert bool(seen.all())


def test_mode_3_is_asked_for_only_where_no_request_has_more_queries_than_keys() -> None:
    assert sight_of(True, None, [(3, 3), (1, 9)]) == CAUSAL
    assert sight_of(True, None, [(3, 3), (2, 1)]) == Sight(4, UNBOUNDED, 0)


def test_the_mask_is_one_for_all_calls_on_a_device() -> None:
    cpu = torch.device("cpu")
    assert compressed_mask(cpu) is compressed_mask(cpu)
    assert torch.equal(compressed_mask(cpu), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    assert CAUSAL.arguments(cpu)["atten_mask"] is compressed_mask(cpu)
    assert ALL_KEYS.arguments(cpu)["atten_mask"] is None
