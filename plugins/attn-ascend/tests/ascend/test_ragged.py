"""Attention over given keys: encoders, expanded MLA, and MLA's prefix in chunks joined by their LSE."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from attn_ascend.backend import AscendBackend
from attn_ascend.ragged import blind_rows
from attn_ascend.step import Lengths
from attn_core.errors import ConfigError
from attn_core.planning.config import LayerKind
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.merge_state import merge_state
from attn_core.testing.reference import ragged_problems, reference_ragged
from attn_core.testing.tolerances import Precision, expect
from torch import Tensor

from .steps import assert_close, kind_of, scene

pytestmark = pytest.mark.usefixtures("emulated")


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def backend() -> AscendBackend:
    found = scene(kind_of(2, 2, 128), (1,), (1,))
    return AscendBackend(found.config, found.cache)


def random(kind: LayerKind, queries: list[int], keys: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(sum(queries), kind.num_q_heads, kind.qk_head_dim).to(dtype),
        torch.randn(sum(keys), kind.num_kv_heads, kind.qk_head_dim).to(dtype),
        torch.randn(sum(keys), kind.num_kv_heads, kind.v_head_dim).to(dtype),
    )


KINDS = {
    "expanded MLA": kind_of(4, 4, 192, v_width=128, ragged=True),
    "192": kind_of(4, 2, 192, ragged=True),
    "128, grouped": kind_of(6, 2, 128, ragged=True),
    "encoder of 80": kind_of(4, 4, 80, ragged=True),
    "64, a window": kind_of(4, 2, 64, ragged=True, sliding_window=3),
    "128, a window": kind_of(4, 2, 128, ragged=True, sliding_window=3),
    "64, sinks": kind_of(4, 2, 64, ragged=True, sinks=True),
    "128, sinks": kind_of(4, 2, 128, ragged=True, sinks=True),
}
LENGTHS = {
    "as many keys as queries": ([5, 1, 40], [5, 1, 40]),
    "more keys": ([5, 1, 4], [17, 130, 4]),
    "fewer keys": ([5, 7, 4], [3, 0, 9]),
    "no key at all": ([2, 1], [0, 0]),
    "requests without queries": ([0, 3, 0], [4, 3, 2]),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", KINDS)
def test_given_keys_are_attended_as_the_oracle_says(name: str, lengths: str, causal: bool) -> None:
    kind, (queries, keys) = KINDS[name], LENGTHS[lengths]
    layer = AttentionLayer.of_kind(kind, 0, sinks=torch.randn(kind.num_q_heads) if kind.sinks else None)
    dtype = torch.bfloat16
    q, k, v = random(kind, queries, keys, dtype)
    if kind.sliding_window and not causal:
        with pytest.raises(ConfigError, match="not causal"):
            ragged(q, k, v, layer, queries, keys, causal=False)
        return
    out, lse = ragged(q, k, v, layer, queries, keys, causal=causal)
    problems = ragged_problems(
        q, k, v, layer, query_start_loc=starts(queries), key_start_loc=starts(keys), causal=causal
    )
    assert_close(out, expect(problems, q, layer, Precision.of(dtype)), lse)


def ragged(
    q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, queries: list[int], keys: list[int], *, causal: bool
) -> tuple[Tensor, Tensor]:
    result = backend().forward_ragged(
        q, k, v, layer, query_start_loc=starts(queries), key_start_loc=starts(keys), max_query_len=max(queries),
        max_key_len=max(keys), causal=causal, return_lse=True,
    )  # fmt: skip
    assert isinstance(result, tuple)
    return result


def test_a_prefix_in_chunks_joins_to_the_whole() -> None:
    """DeepSeek's prefill: new tokens causally, and chunks of the prefix, joined by their LSE."""
    kind = KINDS["expanded MLA"]
    layer = AttentionLayer.of_kind(kind, 0)
    new, prefix = [6, 3], [70, 9]
    whole = [p + n for p, n in zip(prefix, new, strict=True)]
    q, k, v = random(kind, new, whole, torch.bfloat16)
    ends = [0, *accumulate(whole)]

    def keys_of(first: list[int], last: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        rows = [slice(ends[b] + first[b], ends[b] + max(first[b], last[b])) for b in range(2)]
        return torch.cat([k[r] for r in rows]), torch.cat([v[r] for r in rows]), [r.stop - r.start for r in rows]

    own_k, own_v, own = keys_of(prefix, whole)
    state = ragged(q, own_k, own_v, layer, new, own, causal=True)
    for start in range(0, max(prefix), 32):
        chunk_k, chunk_v, lengths = keys_of([min(start, p) for p in prefix], [min(start + 32, p) for p in prefix])
        state = merge_state(state, ragged(q, chunk_k, chunk_v, layer, new, lengths, causal=False))
    want, want_lse = reference_ragged(
        q, k, v, layer, query_start_loc=starts(new), key_start_loc=starts(whole), causal=True
    )
    # each of the 4 parts is rounded to bfloat16 once, and so is each of the 3 joins
    bound = 7 * 2.0**-9 * want.abs().amax()
    assert float((state[0].double() - want).abs().max()) <= float(bound)
    assert float((state[1].double() - want_lse).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "blind"),
    [
        ([3, 2], [3, 5], True, []),
        ([3, 2], [1, 5], True, [slice(0, 2)]),
        ([3, 2], [1, 5], False, []),
        ([3, 2], [3, 0], False, [slice(3, 5)]),
        ([3, 0, 2], [0, 0, 1], True, [slice(0, 3), slice(3, 4)]),
    ],
)
def test_blind_rows_are_those_that_see_no_key(
    queries: list[int], keys: list[int], causal: bool, blind: list[slice]
) -> None:
    assert blind_rows(Lengths(queries, keys), causal) == blind
