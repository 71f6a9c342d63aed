"""Level `fake-device`: the backend unmodified on `npu:0`, its tensors and its streams those of the real torch-npu.

The card is host memory (acl.c), and its operators are the emulator's.
"""

from __future__ import annotations

import pytest
import torch
from attn_ascend.backend import AscendBackend
from attn_core.planning.config import LayerKind
from attn_core.runtime.batch import ForwardMode
from on_card import MHA, MLA, WINDOW, OnCard, assert_close
from torch import Tensor

pytestmark = pytest.mark.usefixtures("card")

DECODE, VERIFY, EXTEND = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND


def test_torch_npu_takes_the_stub_for_a_card() -> None:
    assert torch.npu.is_available()
    moved = torch.arange(6, dtype=torch.int32).to("npu")
    assert (moved.device.type, moved.cpu().tolist()) == ("npu", [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("kind", "mode", "query_lens", "seq_lens"),
    [
        (MHA, EXTEND, [5, 1], [140, 1]),
        (MHA, DECODE, [1, 1], [140, 300]),
        (WINDOW, EXTEND, [5, 1], [140, 30]),
        (WINDOW, DECODE, [1, 1], [140, 300]),
        (MLA, DECODE, [1, 1], [140, 300]),
        (MLA, VERIFY, [4, 4], [140, 300]),
        (MLA, EXTEND, [20, 3], [140, 3]),
    ],
)
def test_eager_steps_run_on_the_card(
    kind: LayerKind, mode: ForwardMode, query_lens: list[int], seq_lens: list[int]
) -> None:
    there = OnCard(kind, seq_lens)
    batch = there.step(mode, query_lens, seq_lens)
    q, k, v = there.tensors(batch.num_tokens)
    backend = AscendBackend(there.config, there.cache)
    backend.init_forward_metadata(batch)
    out = backend.forward(q, k, v, there.layer, batch)
    assert isinstance(out, Tensor)
    assert out.device.type == "npu"
    assert_close(out, there.expected(q, batch))


def test_the_card_takes_no_fp64_as_the_vendor_documents() -> None:
    with pytest.raises(RuntimeError, match="fp64 on the card"):
        torch.ones(2, device="npu").double() + 1
