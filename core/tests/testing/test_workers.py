"""Processes that can be replaced: a backend that crashes, hangs or breaks its device fails its cases and no others."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from attn_core.errors import AttnError
from attn_core.testing import workers
from attn_core.testing.cases import Case
from attn_core.testing.fuzz import Share
from attn_core.testing.runner import verify
from attn_core.testing.workers import Crew, in_processes

#: A window kills the process, a cap of 3 breaks its device for good, a scale of 1/7 never ends.
BACKEND = """
import os, signal, time
from attn_core.runtime.torch_native.backend import TorchNativeBackend

lost = False

class Rough(TorchNativeBackend):
    name = "rough"

    def forward_extend(self, q, k, v, layer, batch, **options):
        global lost
        if layer.sliding_window is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if layer.scale == 1 / 7:
            time.sleep(600)
        lost = lost or layer.softcap == 3.0
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().forward_extend(q, k, v, layer, batch, **options)

    def forward_decode(self, q, k, v, layer, batch, **options):
        return self.forward_extend(q, k, v, layer, batch, **options)
"""
MANIFEST = """
schema = 1
name = "rough"
protocol = ">=1.0,<2"
summary = "Takes its process down"
[[supports]]
phases = ["decode"]
device = "any"
kind = "mha"
dtypes = ["float32"]
head_dims = "any"
page_sizes = "any"
kv_layouts = ["NHD", "HND"]
features = ["sliding_window", "softcap", "lse"]
"""

PLAIN, LONGER = "decode/8x2x64/1@31/dtype=float32", "decode/8x2x64/1@47/dtype=float32"
WINDOW = "decode/8x2x64+window=16/1@31/dtype=float32"
SOFTCAP = "decode/8x2x64+softcap=3.0/1@31/dtype=float32"
ENDLESS = f"decode/8x2x64+scale={1 / 7!r}/1@31/dtype=float32"


@pytest.fixture(autouse=True)
def _rough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with that backend, which other processes find too."""
    package, info = tmp_path / "attn_rough", tmp_path / "attn_rough-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "backend.py").write_text(BACKEND)
    (package / "rough.toml").write_text(MANIFEST)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attn-rough\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attn.backends]\nrough = attn_rough.backend:Rough\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def run(crew: Crew, *ids: str) -> dict[str, str]:
    """What becomes of these cases: id -> the first fault, "" for none."""
    ended = {}
    for _, results in in_processes(iter([Case.parse(text) for text in ids]), crew):
        ended |= {result.case.id: str(result.faults[0]) if result.faults else "" for result in results}
    return ended


def test_a_case_that_kills_its_process_fails_and_the_others_do_not() -> None:
    ended = run(Crew("rough", "cpu", 1, probe=False), PLAIN, WINDOW, LONGER)
    assert ended.pop(WINDOW) == "it raised: the process died, with exit code -9"
    assert ended == {PLAIN: "", LONGER: ""}


def test_a_process_that_lost_its_device_is_replaced() -> None:
    ended = run(Crew("rough", "cpu", 1, probe=False), SOFTCAP, PLAIN)
    assert "illegal memory access" in ended.pop(SOFTCAP)
    assert ended == {PLAIN: ""}


def test_a_case_that_hangs_fails() -> None:
    ended = run(Crew("rough", "cpu", 1, probe=False, hangs_after=2.0), ENDLESS, PLAIN)
    assert "did not end within" in ended.pop(ENDLESS)
    assert ended == {PLAIN: ""}


def test_the_random_case_that_kills_its_process_is_named() -> None:
    ((share, (*_, result)),) = in_processes(iter([Share(0, 200)]), Crew("rough", "cpu", 1, probe=False))
    assert share == Share(0, 200)
    assert "exit code -9" in result.faults[0].message
    assert result.case.mode == "decode"
    assert any(kind.sliding_window for kind in result.case.kinds)


def test_a_device_that_is_broken_for_good_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_LOST", 0)
    monkeypatch.setattr("attn_core.testing.generation.SOFTCAP", 3.0)
    report = verify("rough", workers=1, select="/8x2x64+softcap=3.0/1@")
    assert report.exit_code == 1
    (lost,) = report.failures
    assert lost.faults[0].check == "raised"
    rest = [result for result in report.results if result is not lost]
    assert rest
    assert {result.note for result in rest} == {"not begun: 1 processes were lost to rough on cpu"}


def test_the_time_of_a_run_ends_a_case_that_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.5)
    crew = Crew("rough", "cpu", 1, probe=False, deadline=time.time() + 15)
    begun = time.time()
    ((job, (result,)),) = in_processes(iter([Case.parse(text) for text in (ENDLESS, PLAIN)]), crew)
    assert job == result.case == Case.parse(ENDLESS)
    assert result.status == "not_run"
    assert re.fullmatch(rf"not ended after \d+ seconds, when the time was over: {re.escape(ENDLESS)}", result.note)
    assert time.time() - begun < 60


def test_a_case_that_never_ended_proves_nothing_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.5)
    monkeypatch.setattr("attn_core.testing.axes.other_scale", lambda width: 1 / 7)
    report = verify(
        "rough", workers=1, select="decode/8x2x64+scale=0.14285714285714285/1@31/dtype=float32", max_seconds=15
    )
    assert report.done["contract"].ran == 0
    (result,) = [result for result in report.results if result.note.startswith("not ended")]
    assert result.note in report.table()
    assert {row.outcome for row in report.rows if row.name in ("decode", "mha")} == {"not_run"}


def test_a_process_that_cannot_start_is_said_at_once() -> None:
    with pytest.raises(AttnError, match="could not start: UnknownBackendError"):
        run(Crew("roug", "cpu", 1, probe=False), PLAIN)
