"""verify: both directions, the witness, evidence, JUnit, and what is refused before anything runs."""

from __future__ import annotations

import json
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.errors import BackendRefusedError, UnknownBackendError, UsageError
from attn_core.planning.discovery import register
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing.agenda import Agenda, agenda
from attn_core.testing.blame import explain
from attn_core.testing.cases import Case
from attn_core.testing.proof import Evidence
from attn_core.testing.refusals import check_refusal, refusal_cases
from attn_core.testing.rows import ROWS
from attn_core.testing.run import Target, run_case
from attn_core.testing.runner import verify
from attn_core.testing.scene import Scene
from attn_core.testing.workers import run_job

WINDOW = "decode/8x2x64+window=16/1@31/dtype=float32"


def manifest_of(name: str, **changes: Any) -> dict[str, Any]:
    """A small manifest: float32, pages of 16, no feature."""
    clause = {
        "phases": ["decode"],
        "device": "any",
        "kind": "mha",
        "dtypes": ["float32"],
        "head_dims": [[64, 64]],
        "page_sizes": [16],
        "kv_layouts": ["NHD"],
        "features": [],
        **changes,
    }
    return {"schema": 1, "name": name, "protocol": ">=1.0,<2", "summary": "For tests", "supports": [clause]}


def test_a_right_backend_passes_and_its_evidence_says_what_was_proved(tmp_path: Path) -> None:
    with register(TorchNativeBackend, manifest_of("small", features=["sliding_window"])):
        report = verify("small", junit=tmp_path / "junit.xml", evidence_dir=tmp_path)
    assert report.exit_code == 0
    rows = {row.name: row for row in report.rows}
    assert set(rows) == set(ROWS)
    assert rows["sliding_window"].outcome == rows["decode"].outcome == "proved"
    assert rows["softcap"].outcome == "under_claimed"
    assert rows["prefill"].outcome == "under_claimed"
    (path,) = tmp_path.glob("*/small.json")
    data = json.loads(path.read_text())
    assert Evidence.parse(data, str(path)).outcomes["sliding_window"] == "proved"
    assert data["level"] == "silicon"
    assert data["cases"]["passed"] == len(report.results)
    assert data["versions"]["torch"] == torch.__version__
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert suite.attrib["tests"] == str(len(report.results))
    assert suite.attrib["failures"] == "0"


def test_an_over_claimed_feature_is_named_with_a_case_that_reproduces_it() -> None:
    class Deaf(TorchNativeBackend):
        name = "deaf"

        def forward_extend(self, q, k, v, layer, batch, **options):  # type: ignore[no-untyped-def]
            return super().forward_extend(q, k, v, replace(layer, sliding_window=None), batch, **options)

    with register(Deaf, manifest_of("deaf", features=["sliding_window", "softcap"])):
        report = verify("deaf")
        rows = {row.name: row for row in report.rows}
        assert report.exit_code == 1
        assert rows["sliding_window"].outcome == "over_claimed"
        assert rows["softcap"].outcome == "proved"
        assert rows["sliding_window"].first in report.table()
        assert "; it is right for no window" in report.table()
        assert verify("deaf", case=rows["sliding_window"].first).exit_code == 1
        assert verify("deaf", case="decode/8x2x64+softcap=1.5/1@31/dtype=float32").exit_code == 0


def test_a_pass_of_another_backend_is_a_failure() -> None:
    class Borrower(TorchNativeBackend):
        name = "borrower"

        def __init__(self, config, kv_cache):  # type: ignore[no-untyped-def]
            super().__init__(config, kv_cache)
            self.lender = TorchNativeBackend(config, kv_cache)

        def forward_extend(self, *args, **options):  # type: ignore[no-untyped-def]
            return self.lender.forward_extend(*args, **options)

    with register(Borrower, manifest_of("borrower")) as ref:
        result = run_case(
            Case.parse("decode/8x2x64/1@31/dtype=float32"), Target(ref, System("cpu"), torch.device("cpu"))
        )
    assert [fault.check for fault in result.faults] == ["witness"]


def test_what_is_declared_must_be_planned(target: Target) -> None:
    manifest = Manifest.parse(manifest_of("torch_native"))
    result = run_case(Case.parse(WINDOW), replace(target, ref=replace(target.ref, manifest=manifest)))
    assert [fault.check for fault in result.faults] == ["refused"]
    assert "feature_unsupported" in result.faults[0].message


def test_what_is_not_declared_must_be_refused_for_a_reason_that_fits(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.parse(manifest_of("torch_native"))
    narrow = replace(target, ref=replace(target.ref, manifest=manifest))
    case = replace(Case.parse(WINDOW), refused="feature_unsupported")
    assert check_refusal(case, narrow, probe=True).works_undeclared
    assert check_refusal(case, target, probe=False).faults[0].check == "not_refused"

    from attn_core.testing import refusals

    original = refusals.evaluate

    def misjudged(*args: Any) -> Any:
        decision = original(*args)
        return replace(decision, reasons=tuple(replace(r, code="dtype_unsupported") for r in decision.reasons))

    monkeypatch.setattr(refusals, "evaluate", misjudged)
    assert "dtype_unsupported" in check_refusal(case, narrow, probe=False).faults[0].message


def test_a_backend_that_dies_in_its_constructor_fails_its_cases(target: Target) -> None:
    class Broken(TorchNativeBackend):
        name = "broken"

        def __init__(self, config, kv_cache):  # type: ignore[no-untyped-def]
            raise RuntimeError("no such kernel")

    with register(Broken, manifest_of("broken")) as ref:
        result = run_case(Case.parse("decode/8x2x64/1@31/dtype=float32"), replace(target, ref=ref))
    assert result.status == "failed"
    assert "no such kernel" in result.faults[0].message


def test_what_the_installed_build_lacks_is_not_run_rather_than_failed(target: Target) -> None:
    from attn_core.planning.reasons import reason

    class Stripped(TorchNativeBackend):
        name = "stripped"

        @classmethod
        def build_reasons(cls, config, phase):  # type: ignore[no-untyped-def]
            return [reason("build_unsupported", "softcap", "1.5", "compiled out")] if config.layers[0].softcap else []

    with register(Stripped, manifest_of("stripped", features=["softcap"])) as ref:
        own = replace(target, ref=ref)
        assert run_case(Case.parse("decode/8x2x64/1@31/dtype=float32"), own).status == "passed"
        result = run_case(Case.parse("decode/8x2x64+softcap=1.5/1@31/dtype=float32"), own)
    assert result.status == "not_run"
    assert "build_unsupported" in result.note


def test_processes_find_what_one_process_finds() -> None:
    alone = verify("torch_native", select="draft_extend/8x2x64/2@30")
    together = verify("torch_native", select="draft_extend/8x2x64/2@30", workers=2)
    assert [(r.case, r.status) for r in together.results] == [(r.case, r.status) for r in alone.results]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": "torch_nativ"}, UnknownBackendError),
        ({"tier": "all"}, UsageError),
        ({"device": "gpu"}, UsageError),
        ({"device": "emulated:nothing"}, UsageError),
        ({"case": "decode/nonsense"}, UsageError),
        ({"select": "no case has this"}, UsageError),
        ({"max_cases": 3, "evidence_dir": "nowhere"}, UsageError),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        verify(**{"name": "torch_native", **arguments})


def test_a_backend_for_another_device_is_refused_with_the_reason() -> None:
    with (
        register(TorchNativeBackend, manifest_of("elsewhere", device="cuda")),
        pytest.raises(BackendRefusedError, match="device"),
    ):
        verify("elsewhere")


def test_scenes_are_the_same_each_time_and_poison_spares_what_is_named(target: Target) -> None:
    case = Case.parse("extend/8x2x64/3@5,2@20/batch=2/dtype=float32/memory=shuffled/holes")
    config = target.plan(case).config
    scenes = [Scene(case, config, torch.device("cpu")) for _ in range(2)]
    caches = [scene.allocate() for scene in scenes]
    for scene, cache in zip(scenes, caches, strict=True):
        scene.fill(cache, poison=True)
    assert torch.equal(caches[0].k(0).view(torch.int32), caches[1].k(0).view(torch.int32))
    known = caches[0].k(0).isfinite().flatten(1).all(-1)
    assert not known[0]  # the null page
    finite = int(caches[0].k(0).isfinite().all(-1).all(-1).sum())
    assert finite == 5 + 20 + 1  # both prefixes, and the one token in three that is written already


@pytest.mark.parametrize("option", ["steps", "graph"])
def test_every_key_that_a_later_step_sees_is_in_the_cache_or_written_before_it(target: Target, option: str) -> None:
    """Holes of a second step were junk once: right backends failed."""
    config = target.plan(Case.parse("extend/8x2x64/7@5,4@20/batch=2/dtype=float32/holes")).config
    scene = Scene(
        Case.parse(f"extend/8x2x64/7@5,4@20/batch=2/dtype=float32/holes/{option}"), config, torch.device("cpu")
    )
    cache = scene.allocate()
    scene.fill(cache, poison=True)
    there = cache.k_nhd(0).isfinite().flatten(2).all(-1).flatten()
    for step in (step for wave in scene.waves for step in wave):
        there[step.written[0]] = True
        for s, length in zip(step.sequences, step.batch.seq_lens.tolist(), strict=True):
            assert bool(there[scene.slots(s, range(length))].all()), (option, s)


def test_failures_are_explained_by_the_claim_they_share(target: Target) -> None:
    from attn_core.testing.checks import Fault
    from attn_core.testing.run import Result

    ids = {
        "decode/8x2x64/1@31": "passed",
        "decode/8x2x64+softcap=1.5/1@31": "passed",
        "decode/8x2x64+window=16/1@31": "failed",
        "decode/8x2x64+window=16+softcap=1.5/1@31": "failed",
        "extend/8x2x64+window=16/32@0": "passed",
    }
    fault = (Fault("output", "off"),)
    results = [Result(Case.parse(i), s, fault if s == "failed" else ()) for i, s in ids.items()]  # type: ignore[arg-type]
    (blame,) = explain(results)
    assert blame.feature == "sliding_window"
    assert (blame.failed, blame.tried) in {(2, 2), (2, 3)}
    assert blame.first.case.id == "decode/8x2x64+window=16/1@31"


def test_refusals_of_torch_native_hold(target: Target) -> None:
    for case in refusal_cases(target.ref.manifest, "contract", target.system):
        assert check_refusal(case, target, probe=False).status == "passed", case.id


class Clock:
    """A clock of which every look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(
    ("cases", "tiers", "outcome"),
    [
        (lambda plan: 2, [], "not_run"),
        (lambda plan: len(plan.required) + 3, [], "proved"),
        (lambda plan: plan.size + 5, ["contract"], "proved"),
    ],
    ids=["nearly nothing", "each thing alone", "the first tier"],
)
def test_a_run_that_its_time_cut_off_says_what_it_proved(
    cases: Callable[[Agenda], int], tiers: list[str], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_core.testing.runner.time", Clock())
    wide = {"page_sizes": {"multiple_of": 16, "max": 128}}
    with register(TorchNativeBackend, manifest_of("small", **wide)) as ref:
        first = agenda(ref.manifest, "contract", System("cpu"))
        report = verify("small", "numerics", max_seconds=cases(first) + 1, evidence_dir=tmp_path)
    assert report.exit_code == 0
    (path,) = tmp_path.glob("*/small.json")
    data = json.loads(path.read_text())
    ran, of = data["done"]["contract"].values()
    assert (ran == of) == (tiers == ["contract"])
    assert data["done"]["numerics"]["ran"] < data["done"]["numerics"]["of"]
    assert data["tiers"] == tiers
    cut = data["not_run"]["not begun: out of time"]
    assert cut == data["cases"]["not_run"] == sum(done["of"] - done["ran"] for done in data["done"].values())
    assert {data["features"][name]["outcome"] for name in ("decode", "mha")} == {outcome}
    assert "not begun" in data["features"]["decode"]["note"]
    assert "not all of it ran" in report.table()


def test_a_run_in_which_nothing_had_time_leaves_no_evidence(tmp_path: Path) -> None:
    report = verify("torch_native", max_seconds=0, evidence_dir=tmp_path)
    assert report.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_always_raises_is_said_to_and_not_called_wrong() -> None:
    class Absent(TorchNativeBackend):
        name = "absent"

        def forward_extend(self, *given: Any, **options: Any) -> Any:
            raise RuntimeError("libattention.so.3: cannot open shared object file")

    with register(Absent, manifest_of("absent", features=["sliding_window"])):
        report = verify("absent", max_failures=7)
    assert report.count("failed") == 7
    assert {row.outcome for row in report.rows if row.declared} == {"raised"}
    assert set(report.not_run) == {"not begun: 7 cases had failed"}
    assert "decode (raised)" in report.table()


def test_what_only_a_random_case_shows_is_made_small_and_can_be_repeated() -> None:
    class Fives(TorchNativeBackend):
        name = "fives"

        def forward_extend(self, q, k, v, layer, batch, **options):  # type: ignore[no-untyped-def]
            wrong = replace(layer, scale=layer.scale * 1.1) if layer.group_size == 5 else layer
            return super().forward_extend(q, k, v, wrong, batch, **options)

    with register(Fives, manifest_of("fives", features=["sliding_window", "lse"])):
        report = verify("fives", "stress")
        (smallest,) = report.failures
        (kind,) = smallest.case.kinds
        assert (len(smallest.case.requests), kind.group_size, kind.sliding_window) == (1, 5, None)
        assert f"attn verify fives --device cpu --case '{smallest.case.id}'" in report.table()
        assert "group_size=5" in report.table()
        assert report.done["fuzz"].ran < report.done["fuzz"].of
        assert "fuzz" not in report.whole_tiers
        assert verify("fives", case=smallest.case.id).exit_code == 1


def test_warnings_of_a_backend_are_told_once() -> None:
    class Talker(TorchNativeBackend):
        name = "talker"

        def init_forward_metadata(self, batch: Any) -> None:
            warnings.warn("strides are copied", UserWarning, stacklevel=1)
            super().init_forward_metadata(batch)

    with register(Talker, manifest_of("talker")):
        report = verify("talker", select="/joined")
    assert report.exit_code == 0
    assert f"warned in {report.count('passed')} cases: UserWarning: strides are copied" in report.table()


def test_what_works_and_is_not_declared_is_told() -> None:
    with register(TorchNativeBackend, manifest_of("modest", features=["sinks"])):
        report = verify("modest")
    rows = {row.name: row for row in report.rows}
    assert rows["softcap"].outcome == "under_claimed"
    assert rows["softcap"].passed > 20  # not its plain refusal alone: everything that would prove it
    # the one feature that depends on what it stands beside: the bits of a sink's rows depend on their place
    assert rows["batch_invariant"].outcome == "refused"
    assert "refused cases work when asked all the same" in rows["batch_invariant"].note
    assert "works, and is not declared: head_dim, as in decode/" in report.table()


def test_an_error_of_the_kit_itself_fails_the_case_and_not_the_run(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise StopIteration

    monkeypatch.setattr("attn_core.testing.workers.check_refusal", broken)
    case = replace(Case.parse(WINDOW), refused="feature_unsupported")
    (result,) = run_job(case, target, probe=True, deadline=None)
    assert result.status == "failed"
    assert "StopIteration" in result.faults[0].message
