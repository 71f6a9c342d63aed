"""The Triton kernels around FlashAttention 3 on Triton's interpreter, beside their definitions in torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attn_core.runtime.batch import TreeMask
from attn_fa3 import join as joining
from attn_fa3 import tree
from attn_fa3.kernels import join
from attn_fa3.kernels import quantize as quantize_kernel
from attn_fa3.kernels import tree as tree_kernel
from attn_fa3.queries import quantize
from torch import Tensor

PARENTS = [[-1, 0, 0, 1, 3, -1], [-1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2]]


def part(tokens: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """An output and its log-sum-exp by strides that are not the plain ones; the second row has no keys."""
    out, lse = torch.randn(heads, tokens, width).transpose(0, 1), torch.randn(heads, tokens).t()
    lse[1] = float("-inf")
    out[1] = float("nan")
    return out, lse


@pytest.mark.parametrize(("heads", "width"), [(9, 64), (3, 40), (16, 128)])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("sink", [False, True])
def test_join_is_attention_over_both_key_sets_and_a_sink(heads: int, width: int, second: bool, sink: bool) -> None:
    torch.manual_seed(0)
    first, other = part(4, heads, width), part(4, heads, width) if second else None
    sinks = torch.randn(heads) if sink else None
    out, lse = torch.empty(4, heads, width), torch.empty(4, heads)
    join.launch_join(first, other, sinks, out, lse)
    want, want_lse = joining.join(first, other, sinks)
    torch.testing.assert_close(out, torch.where(want_lse.isfinite()[..., None], want, 0.0))
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7, 9, 100])
@pytest.mark.parametrize("page_stride", [4, 8])
def test_own_keys_are_those_of_the_definition(window: int | None, page_stride: int) -> None:
    visible = TreeMask.from_parents(torch.tensor(PARENTS)).visible
    prefix = torch.tensor([8, 0, 3], dtype=torch.int32)
    table = torch.randperm(60, dtype=torch.int32)[:15].view(3, 5)
    options = {"page_size": 4, "page_stride": page_stride, "window": window}
    want = tree.own_keys(visible, prefix, table, **options)  # type: ignore[arg-type]
    slots, counts = tree_kernel.launch_own_keys(visible, prefix, table, 4, page_stride, window)
    assert torch.equal(counts, want.counts)
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(slots[row, :count], want.slots[row, :count])


@pytest.mark.parametrize(
    ("starts", "batch"), [(None, 6), (None, 2), ([0, 4, 6], 2), ([0, 0, 1, 1, 6, 6], 5), ([0, 4], 1)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (9, 3, 48)])
def test_quantised_queries_are_those_of_the_definition(
    starts: list[int] | None, batch: int, heads: int, kv_heads: int, width: int
) -> None:
    """Starts that end before the last row leave padding behind, which has no say in anything."""
    torch.manual_seed(0)
    q = torch.randn(6, 2 * heads, width)[:, :heads] * torch.tensor([500.0, 1e-3, 1.0, 0.0, 1.0, 7.0])[:, None, None]
    begins = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    if starts is not None:
        q[starts[-1] :] = 1e4
    want = quantize(q, kv_heads, batch, begins)
    found, descale = quantize_kernel.launch_quantize(q, kv_heads, batch, begins)
    assert float(want.descale.max()) * 448 < 5e3
    full = torch.tensor([True] * batch if starts is None else [a < b for a, b in pairwise(starts)])
    assert torch.equal(descale[full], want.descale[full])
    # the interpreter rounds e4m3 worse than the hardware: it loses the carry into a power of two, and cuts subnormals
    exact = want.q.float()
    carried = torch.frexp(exact)[0].abs() == 0.5
    assert ((found.float() - exact).abs() <= 2**-9)[~carried].all()
    assert 0.8 < (~carried).float().mean() < 1.0
