"""Level `fake-device`: the conformance kit on `npu:0`, its graphs captured and replayed, and a model that generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attn_ascend.emulator.device import EMULATOR
from attn_core.generate import session
from attn_core.planning.discovery import discover
from attn_core.planning.system import System
from attn_core.testing.generation import generate_cases, spread
from attn_core.testing.run import Target, run_case
from on_card import journal
from tiny_models import folder_of, generate

pytestmark = pytest.mark.usefixtures("card")

A2 = System("npu", "ascend910b")
REF = discover().find("ascend")
CASES = generate_cases(REF.manifest, "contract", A2)
GRAPHS = [case for case in CASES if "graph" in case.options]
OTHERS = spread([case for case in CASES if "graph" not in case.options], 24)


@pytest.mark.parametrize("case", [*GRAPHS, *OTHERS], ids=lambda case: case.id)
def test_a_case_of_the_kit_passes_on_the_card(case) -> None:  # type: ignore[no-untyped-def]
    journal()
    result = run_case(case, Target(REF, A2, torch.device("npu")))
    assert result.faults == ()
    if result.status == "passed" and "graph" in case.options:
        assert journal().count("replay") == 3


@pytest.mark.parametrize("name", ["Llama", "Llama, heads of 128"])
def test_decode_steps_of_a_model_are_graphs_and_give_the_tokens_of_eager_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "pick_device", lambda asked: ("npu", EMULATOR.system()))
    folder_of(name, tmp_path)
    eager, _ = generate(tmp_path, device="npu"), journal()
    graphs, done = generate(tmp_path, "--cuda-graph", device="npu"), journal()
    assert graphs["ran"] == {"prefill": ["ascend"], "decode": ["ascend"]}
    assert [r["tokens"] for r in graphs["requests"]] == [r["tokens"] for r in eager["requests"]]
    assert done.count("replay") == graphs["steps"]["decode"]["steps"] >= 5
