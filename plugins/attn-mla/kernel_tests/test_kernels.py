"""The Triton kernels of queries in e4m3 on Triton's interpreter, beside their definition in torch."""

from __future__ import annotations

import pytest
import torch
from attn_mla.kernels import queries as kernels
from attn_mla.queries import quantize

VALUES = {
    "ordinary": (1.0, 1.0),
    "just in": (1.0, 448.0),
    "just out": (1.0, 449.0),
    "a power of two times the end": (1.0, 896.0),
    "large": (20.0, 5e3),
    "at the end": (60.0, 28672.0),
    "beyond": (60.0, 1e6),
    "not finite": (1.0, float("inf")),
    "not a number": (1.0, float("nan")),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("tokens", "heads"), [(4, 3), (8, 16), (4, 21)])
def test_quantised_queries_are_those_of_the_definition(
    values: str, tokens: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By strides that are not the plain ones, with a padded request whose numbers have no say."""
    monkeypatch.setattr(kernels, "_PARTS", 2 * tokens)  # heads in two parts
    torch.manual_seed(0)
    spread, largest = VALUES[values]
    q = torch.randn(tokens, 2 * heads, 40).mul_(spread).clamp_(-400, 400)[:, :heads]
    q[0, heads - 1, 39] = largest
    q[tokens // 2, 0, 0] = 1e9
    table = torch.tensor([[3, 0], [5, 1], [0, 0], [2, 2]], dtype=torch.int32)
    want = quantize(q, table, factor=0.25)
    found, scale = kernels.launch_quantize(q, table, 0.25)
    assert scale.tolist() == want.scale.tolist()
    exact, mine = want.q.float(), found.float()
    assert torch.equal(exact.isnan(), mine.isnan())
    # the interpreter rounds e4m3 worse than the hardware: it loses the carry into a power of two, cuts subnormals, and
    # takes ties upwards, which queries in fp32 do not have
    carried = torch.frexp(exact)[0].abs() == 0.5
    near = (mine - exact).abs() <= 2**-9
    assert near[~carried & ~exact.isnan()].all()
    assert 0.8 < (~carried).float().mean() < 1.0
