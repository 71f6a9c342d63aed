"""Level `fake-device`: graphs through the vendor's NPUGraph, its task groups and updates; each replay is computed."""

from __future__ import annotations

import pytest
import torch
from attn_ascend import sight
from attn_ascend.graphs import GraphTasks
from attn_core.planning.config import LayerKind
from attn_core.runtime.batch import ForwardMode
from captured_graphs import CaptureError
from host_memory import graphs, host, reads
from on_card import MHA, WINDOW, Captured, OnCard, assert_close, journal

pytestmark = pytest.mark.usefixtures("card")

DECODE, VERIFY = ForwardMode.DECODE, ForwardMode.TARGET_VERIFY
STEPS = {"decode": (DECODE, [1, 1]), "verify": (VERIFY, [4, 4])}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("step", STEPS)
def test_the_vendors_calls_come_in_the_order_that_it_documents(step: str, layers: int) -> None:
    journal()
    captured = Captured(OnCard(MHA, [140, 300]), *STEPS[step], layers=layers)
    found = journal()
    assert (found[0], found[-1]) == ("capture_begin", "capture_end")
    assert found[1:-1] == ["wait", "reset", "group_begin", "group_end"] * layers
    captured.renewed([133, 131])
    assert [line for line in journal() if not line.startswith("stream")] == [
        "update_begin", "update_end", "record"] * layers  # fmt: skip
    captured.graph.replay()
    assert "replay" in journal()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [MHA, WINDOW], ids=["heads of 128", "heads of 64, a window"])
def test_replays_give_the_answers_of_their_steps_and_move_nothing(kind: LayerKind, step: str) -> None:
    captured = Captured(OnCard(kind, [140, 300]), *STEPS[step])
    pointers = captured.out.data_ptr(), captured.state.table.data_ptr(), captured.state.slots.data_ptr()
    for seq_lens in ([129, 131], [255, 130], [256, 383], [257, 5], [384, 384]):
        host(captured.out).fill_(float("nan"))
        done = captured.replay(seq_lens)
        assert_close(captured.out, captured.expected(done))
    assert pointers == (captured.out.data_ptr(), captured.state.table.data_ptr(), captured.state.slots.data_ptr())


def test_a_replay_never_reads_the_card() -> None:
    captured = Captured(OnCard(MHA, [140, 300]), *STEPS["decode"])
    before = list(reads)
    captured.replay([133, 131])
    assert reads == before


def test_what_a_capture_is_the_first_to_need_outlives_it() -> None:
    """The mask is one for all calls on a card: made within a capture, it would be a graph's and hold nothing yet."""
    sight.compressed_mask.cache_clear()
    there = OnCard(MHA, [140, 300])
    captured = Captured(there, *STEPS["decode"])
    step = there.step(DECODE, [1, 1], [140, 300])
    captured.backend.init_forward_metadata(step)
    out = captured.backend.forward(captured.q, captured.k, captured.v, there.layer, step)
    assert_close(out, there.expected(captured.q, step))


# -- the controls: what the fake card is blind to, these tests would not prove


def test_a_graph_that_is_not_renewed_would_hang() -> None:
    captured = Captured(OnCard(MHA, [140, 300]), *STEPS["decode"])
    captured.replay([133, 131])
    captured.graph.replay()
    (fault,) = graphs.faults
    assert "nobody has recorded" in fault
    graphs.faults.clear()


def test_lengths_that_are_not_renewed_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GraphTasks.renew
    monkeypatch.setattr(GraphTasks, "renew", lambda self, key, lengths: right(self, key, [140, 300]))
    captured = Captured(OnCard(MHA, [140, 300]), *STEPS["decode"])
    done = captured.replay([133, 131])
    with pytest.raises(AssertionError):
        assert_close(captured.out, captured.expected(done))


def test_what_a_card_refuses_in_a_capture_is_refused() -> None:
    rows = torch.ones(4, device="npu")
    with torch.npu.graph(torch.npu.NPUGraph(), stream=torch.npu.Stream()):
        for wrong in (lambda: rows.sum().item(), lambda: rows.cpu(), lambda: torch.ones(4).to("npu")):
            with pytest.raises(CaptureError, match="in a capture"):
                wrong()
