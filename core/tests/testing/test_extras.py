"""The cases that a tier has besides its ladders: layer ids from elsewhere than 0, narrow sinks, far pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attn_core.planning.system import System
from attn_core.testing import far
from attn_core.testing.agenda import agenda
from attn_core.testing.cases import Case
from attn_core.testing.extras import FAR, FIRST_LAYER, extra_cases
from attn_core.testing.liars.base import FAR_OF_LIARS
from attn_core.testing.run import Target, run_case
from attn_core.testing.runner import verify
from attn_core.testing.scene import Scene

CPU = System("cpu")
GIB = 1 << 30


def small(target: Target) -> list[Case]:
    """The far cases, not quite so far."""
    return extra_cases(target.ref.manifest, "stress", CPU, far=FAR_OF_LIARS)


def wrong(cases: Sequence[Case], target: Target) -> list[str]:
    results = [run_case(case, target) for case in cases]
    return [f"{r.case.id}: {r.note or r.faults[0]}" for r in results if r.status != "passed"]


def test_extra_cases_are_few_and_leave_the_others_as_they_are(target: Target) -> None:
    whole = agenda(target.ref.manifest, "contract", CPU)
    rest = {case: part for case, part in whole.parts.items() if case not in whole.last}
    alone = replace(whole, parts=rest, last=frozenset())
    assert [job for job in whole.jobs() if job not in whole.last] == list(alone.jobs())
    assert whole.last == {*extra_cases(target.ref.manifest, "contract", CPU)}
    assert 0 < len(whole.last) < 30
    assert not whole.last & whole.required
    some = agenda(target.ref.manifest, "contract", CPU, max_cases=60)
    assert not some.last


def test_every_mode_has_later_layers_and_narrow_sinks(target: Target) -> None:
    cases = extra_cases(target.ref.manifest, "contract", CPU)
    modes = {"extend", "decode", "verify", "mixed", "draft_extend", "ragged"}
    assert {case.mode for case in cases if case.first_layer} == modes
    assert {case.mode for case in cases if "sinks16" in case.options} == modes
    later = next(case for case in cases if case.first_layer and case.mode == "decode")
    assert {i for kind in later.config().layers for i in kind.layer_ids} == {FIRST_LAYER, FIRST_LAYER + 1}
    assert wrong(cases, target) == []


def test_narrow_sinks_are_narrow_and_others_are_not(target: Target) -> None:
    case = next(c for c in extra_cases(target.ref.manifest, "contract", CPU) if "sinks16" in c.options)
    dtypes = []
    for options in (case.options, case.options - {"sinks16"}):
        (layer,) = Scene(replace(case, options=options), case.config(), torch.device("cpu")).layers
        assert layer.sinks is not None
        dtypes.append(layer.sinks.dtype)
    assert dtypes == [torch.bfloat16, torch.float32]


def test_every_form_of_the_cache_has_far_pages(target: Target) -> None:
    cases = extra_cases(target.ref.manifest, "stress", CPU)
    forms = {(c.layout, c.mode, c.kv_dtype) for c in cases}
    for layout in ("NHD", "HND", "MLA"):
        assert {(layout, mode, "auto") for mode in ("extend", "decode", "verify")} <= forms
        assert {(layout, mode, "fp8_e4m3") for mode in ("extend", "decode")} <= forms
        assert any(c.layout == layout and "nosave" in c.options for c in cases)
    assert {c.kinds[0].num_q_heads for c in cases if c.page_size == 64} == {32, 16}
    assert len(cases) <= 30
    assert all(c.far == FAR == 31 and Case.parse(c.id) == c for c in cases)
    assert max(map(far.memory_needed, cases)) <= 9.1 * GIB


def test_far_pages_are_beyond_what_an_address_holds_and_wrap_to_other_data(target: Target) -> None:
    for case in small(target):
        scene = Scene(case, case.config(), torch.device("cpu"))
        (layer_id,) = scene.truth
        cache = scene.allocate()
        scene.fill(cache, poison=True)
        pages = [page for step in scene.waves[0] for page in step.batch.page_table.flatten().tolist()]
        for pool in (p for p in (cache.k(layer_id), cache.v(layer_id)) if p is not None):
            stride = pool.stride(0)
            for page in pages:
                assert page * stride >= 1 << case.far
                wrapped = {page * stride % (1 << bits) // stride for bits in (case.far, case.far + 1)}
                assert wrapped != {page}
                assert not any(pool[at].float().isfinite().any() for at in wrapped - {page})


def test_torch_native_reads_and_writes_far_pages(target: Target) -> None:
    assert wrong(small(target), target) == []


def test_too_little_memory_is_no_pass(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "memory_free", lambda device: 2 * GIB)
    case = next(c for c in extra_cases(target.ref.manifest, "stress", CPU) if c.kv_dtype == "auto")
    result = run_case(case, target)
    assert (result.status, result.note) == ("not_run", "not begun: 9 GiB must be free on cpu, and 2 GiB are")
    report = verify("torch_native", "stress", case=case.id)
    assert report.exit_code == 1
    assert not report.whole_tiers or report.whole_tiers[-1] != "stress"


def test_emulators_have_no_far_pages(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.testing.agenda.generate_cases", lambda *given: [])
    real, emulated = (agenda(target.ref.manifest, "stress", CPU, emulated=e) for e in (False, True))
    assert {case.far for case in real.cases if case in real.last} == {0, FAR}
    assert {case.far for case in emulated.cases if case in emulated.last} == {0}
