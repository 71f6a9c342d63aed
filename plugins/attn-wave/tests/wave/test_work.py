"""The work list: every row meets every key that it may see exactly once, split or not, planned or captured."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from attn_wave.step import Lengths
from attn_wave.tables import KeyPlaces
from attn_wave.variant import WORK_FIELDS, Variant
from attn_wave.work import MIN_RUN, Heads, Reach, work_of

NARROW, WIDE = Variant(64, 64, "float16", 16), Variant(64, 64, "float16", 64)


def reach_of(queries: list[int], keys: list[int], causal: bool, window: int | None, *, captured: bool = False) -> Reach:
    n, m = torch.tensor(queries), torch.tensor(keys)
    room = 1024
    first = torch.arange(len(keys)) * room if captured else m.cumsum(0) - m
    places = KeyPlaces(first, first, first, room if captured else 0)
    lengths = Lengths(n, m, queries[0] if captured else None)
    return lengths.reach(places, torch.zeros_like(m), m, causal=causal, window=window)


def items(reach: Reach, heads: Heads, variant: Variant, tokens: int) -> tuple[list[dict[str, int]], int]:
    work = work_of(reach, heads, variant, tokens)
    return [dict(zip(WORK_FIELDS, row, strict=True)) for row in work.items.tolist()], work.runs


def met(
    found: list[dict[str, int]], heads: Heads, queries: list[int], keys: list[int], first: list[int]
) -> Counter[tuple[int, ...]]:
    """(request, KV head, row of the request, key position) of every meeting that an item makes."""
    counted: Counter[tuple[int, ...]] = Counter()
    starts = [sum(queries[:b]) * heads.group for b in range(len(queries) + 1)]
    for item in found:
        b = next(b for b in range(len(queries)) if starts[b] <= item["row_start"] < starts[b + 1])
        assert item["row_start"] + item["row_count"] <= starts[b + 1]
        assert item["key_start"] - first[b] == item["key_base"]
        head = item["query_offset"] // heads.query_step
        assert (item["key_offset"], item["value_offset"]) == (head * heads.key_step, head * heads.value_step)
        for row in range(item["row_start"], item["row_start"] + item["row_count"]):
            for position in range(item["key_base"], item["key_base"] + item["key_count"]):
                counted[b, head, row - starts[b], position] += 1
    return counted


CASES = {
    "decodes": ([1, 1, 1], [300, 1, 40], True, None),
    "a prefill": ([70], [70], True, None),
    "a prefill with a prefix": ([5, 30], [500, 64], True, None),
    "a window": ([9, 3], [400, 20], True, 33),
    "given keys": ([4, 6], [7, 300], False, None),
    "nothing to see": ([2, 3], [0, 5], False, None),
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("variant", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_rows_meet_what_they_see_once(name: str, variant: Variant, captured: bool) -> None:
    """More keys than a row sees are masked in the kernel; none that it sees may be left out or met twice."""
    queries, keys, causal, window = CASES[name]
    if captured and len(set(queries)) > 1:
        queries = [queries[0]] * len(queries)
    heads = Heads(2, 3, 24, 8, 16)
    reach = reach_of(queries, keys, causal, window, captured=captured)
    found, _ = items(reach, heads, variant, sum(queries))
    counted = met(found, heads, queries, keys, reach.key.tolist())
    assert set(counted.values()) <= {1}
    for b, (n, m) in enumerate(zip(queries, keys, strict=True)):
        for row in range(n * heads.group):
            position = m - n + row // heads.group
            last = min(m, position + 1) if causal else m
            begin = 0 if window is None else max(0, position - window + 1)
            for head in range(heads.kv_heads):
                assert all((b, head, row, p) in counted for p in range(begin, last))


@pytest.mark.parametrize("captured", [False, True])
def test_results_of_runs_lie_apart(captured: bool) -> None:
    heads, queries, keys = Heads(2, 4, 8, 8, 8), [1, 1], [900, 300]
    found, runs = items(reach_of(queries, keys, True, None, captured=captured), heads, NARROW, 2)
    rows = [
        row
        for item in found
        if item["key_count"]
        for row in range(item["out_start"], item["out_start"] + item["row_count"])
    ]
    assert runs > 1
    assert len(rows) == len(set(rows))
    assert max(rows) < runs * heads.kv_heads * sum(queries) * heads.group


def test_short_requests_are_not_split_and_busy_chips_neither() -> None:
    heads = Heads(8, 4, 8, 8, 8)
    _, runs = items(reach_of([1], [MIN_RUN], True, None), heads, NARROW, 1)
    assert runs == 1
    _, runs = items(reach_of([1] * 80, [4000] * 80, True, None), heads, NARROW, 80)
    assert runs == 1
    _, runs = items(reach_of([1], [4000], True, None), heads, NARROW, 1)
    assert runs > 16


def test_every_index_is_one_that_wave_can_take() -> None:
    """Wave marks index arithmetic unsigned: nothing negative may reach it, a captured request of padding included."""
    for keys in ([0, 0], [0, 3], [700, 1]):
        work = work_of(reach_of([4, 4], keys, True, 5, captured=True), Heads(2, 3, 24, 8, 16), NARROW, 8)
        assert int(work.items.min()) >= 0
