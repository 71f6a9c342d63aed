"""The Triton kernels around FlashInfer on Triton's interpreter, beside their definitions in plain torch."""

from __future__ import annotations

import pytest
import torch
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_flashinfer import masks, page_indices, sinks
from attn_flashinfer.kernels import metadata
from attn_flashinfer.key_buffers import KeyBuffers

PARENTS = [[-1, 0, 0, 1, 3, -1], [-1, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("counts", [[3], [0, 5, 1], [1024, 1, 2050, 0]])
@pytest.mark.parametrize("strided", [False, True])
def test_expand_gives_each_request_its_first_pages(counts: list[int], strided: bool) -> None:
    width = max(counts) + 3
    table = torch.randint(1, 1 << 20, (len(counts), 2 * width), dtype=torch.int32)[:, :: 2 if strided else 1]
    table = table[:, 1 : 1 + max(counts)]
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    found, wanted = (torch.full((sum(counts) + 4,), -1, dtype=torch.int32) for _ in range(2))
    metadata.launch_expand(table, indptr, found, max(counts))
    page_indices.expand(table, indptr, wanted, longest=max(counts))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("lens", [[7], [0, 16, 1, 17], [9000, 1, 4097, 4096, 33]])
def test_refill_is_what_graphs_read(lens: list[int], page_size: int) -> None:
    buffers = KeyBuffers(6, 9000, page_size, torch.device("cpu"))
    table = torch.randint(1, 1 << 20, (len(lens), 9001), dtype=torch.int32)[:, 1:]
    lengths = torch.tensor(lens, dtype=torch.int32)
    buffers.refill(lengths, lengths, table)
    wanted = [buffers.indptr(len(lens)), buffers.last_page_len(len(lens)), buffers.indices]
    indptr, last_page_len, indices = (torch.full((n,), -1, dtype=torch.int32) for n in (7, 6, 54000))
    metadata.Refill(indptr, last_page_len, indices, page_size)(lengths, table, -(-max(lens) // page_size))
    total = int(wanted[0][-1])
    assert torch.equal(indptr[: len(lens) + 1], wanted[0])
    assert torch.equal(last_page_len[: len(lens)], wanted[1])
    assert torch.equal(indices[:total], wanted[2][:total])
    assert (indices[total:] == -1).all(), "what lies behind the pages"


def batch_of(what: str) -> ForwardBatch:
    mode, query, lens = ForwardMode.TARGET_VERIFY, [6, 6], [14, 6]
    more: dict[str, object] = {}
    if what == "tree":
        more["tree"] = TreeMask.from_parents(torch.tensor(PARENTS))
    else:
        mode, query, lens = ForwardMode.EXTEND, [9, 3, 0], [11, 3, 5]
        more["spans"] = [[(3, 7), (8, 11)], [(0, 2)], []]
    pages = [list(range(1, 20))] * len(lens)
    return ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=4, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["tree", "spans"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_pack_is_what_each_query_sees(what: str, window: int | None) -> None:
    batch = batch_of(what)
    assert batch.seq_lens_cpu is not None
    assert batch.query_start_loc_cpu is not None
    plan = masks.MaskPlan.of(torch.diff(batch.query_start_loc_cpu).numpy(), batch.seq_lens_cpu.numpy())
    found, wanted = (torch.zeros(plan.num_bytes, dtype=torch.uint8) for _ in range(2))
    metadata.launch_pack(batch, window, plan.byte_starts, found, plan.longest, None)
    masks.pack(batch, window, plan.byte_starts, wanted, longest=plan.longest)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("heads", "width"), [(9, 64), (3, 40), (16, 128)])
def test_fold_is_one_more_logit(heads: int, width: int) -> None:
    torch.manual_seed(0)
    out, lse, sink = torch.randn(5, heads, width), torch.randn(5, heads), torch.randn(heads)
    lse[1] = float("-inf")
    out[1] = float("nan")
    sink[0] = float("-inf")
    mine, given, folded = out.clone(), lse.clone(), torch.full_like(lse, 7.0)
    metadata.launch_fold(mine, given, sink, folded)
    want = sinks.fold_sinks(out, lse, sink, return_lse=True)
    torch.testing.assert_close(mine, out)
    torch.testing.assert_close(folded, want)
    # several warps of a program read it: what one of them wrote there, a later one would read (and did, on a GPU)
    assert torch.equal(given, lse)


def test_fold_without_a_log_sum_exp_writes_none() -> None:
    torch.manual_seed(0)
    out, lse, sink = torch.randn(5, 3, 64), torch.randn(5, 3), torch.randn(3)
    mine, given = out.clone(), lse.clone()
    metadata.launch_fold(mine, given, sink, None)
    assert sinks.fold_sinks(out, lse, sink, return_lse=False) is None
    torch.testing.assert_close(mine, out)
    assert torch.equal(given, lse)
