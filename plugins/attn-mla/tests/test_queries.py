"""The scale of queries in e4m3: 1 where they fit, a power of two where not, and whose values have a say in it."""

from __future__ import annotations

import pytest
import torch
from attn_mla.queries import quantize

TABLE = torch.tensor([[3, 4], [7, 0], [5, 6]], dtype=torch.int32)
PADDED = torch.tensor([[3, 4], [0, 0], [5, 6]], dtype=torch.int32)


def queries(tokens: int = 3) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, 4, 576).bfloat16()


@pytest.mark.parametrize(
    ("largest", "scale"), [(1.0, 1), (448.0, 1), (450.0, 2), (896.0, 2), (900.0, 4), (1e4, 32), (28672.0, 64)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_scale_is_the_next_power_of_two_with_which_all_fit(largest: float, scale: int, sign: float) -> None:
    q = queries()
    q[2, 1, 3] = sign * largest
    found = quantize(q, TABLE, factor=0.5)
    assert found.scale.tolist() == [scale * 0.5]
    assert torch.equal(found.q.float() * scale, (q.float() / scale).to(torch.float8_e4m3fn).float() * scale)
    assert abs(float(found.q[2, 1, 3]) * scale - sign * largest) <= largest / 16


def test_what_no_scale_holds_is_nan_and_nothing_else_is() -> None:
    q = queries()
    q[0, 0, 0], q[0, 1, 7], q[2, 3, 575], q[1, 1, 1] = 3e4, float("inf"), float("nan"), -28672.0
    found = quantize(q, TABLE)
    assert found.scale.tolist() == [64.0]
    assert found.q.float().isnan().nonzero().tolist() == [[0, 0, 0], [0, 1, 7], [2, 3, 575]]


@pytest.mark.parametrize("given", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("each", [1, 4])
def test_rows_of_padding_have_no_say(given: float, each: int) -> None:
    q = queries(3 * each)
    want = quantize(q, PADDED)
    q[each : 2 * each] = given
    found = quantize(q, PADDED)
    assert found.scale.tolist() == want.scale.tolist() == [1.0]
    for rows in (slice(0, each), slice(2 * each, None)):
        assert torch.equal(found.q[rows].view(torch.uint8), want.q[rows].view(torch.uint8))


def test_a_request_with_large_values_rounds_no_other_ones_anew() -> None:
    """Values of 2^-6 times the scale and more have the same 4 significant bits at every power of two."""
    q = queries()
    alone = quantize(q, TABLE)
    q[1, 0, 0] = 1700.0
    found = quantize(q, TABLE)
    assert found.scale.tolist() == [4.0]
    others = torch.ones(q.shape, dtype=torch.bool)
    others[1, 0, 0] = False
    counted = others & (q.abs() >= 4 * 2.0**-6)
    assert torch.equal(found.q.float()[counted] * 4, alone.q.float()[counted])
    small = others & ~counted
    assert ((found.q.float() * 4 - q.float()).abs()[small] <= 4 * 2.0**-10).all()
