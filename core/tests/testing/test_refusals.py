"""What is not declared is refused with the reason that the evaluation gave, also where a phase has a fallback."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from attn_core.planning import reasons
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import reason
from attn_core.planning.system import System
from attn_core.testing import refusals
from attn_core.testing.cases import Case
from attn_core.testing.fuzz import Share, run_share
from attn_core.testing.refusals import check_refusal, refusal_cases
from attn_core.testing.run import Result, Target

#: As FlashMLA is: latent decodes in large pages on one chip, and prefill by others, which are not here.
DECODES = {
    "schema": 1,
    "name": "decodes",
    "protocol": ">=1.0,<2",
    "summary": "Decodes alone",
    "fallback": {"prefill": ["somebody", "triton"]},
    "supports": [
        {
            "phases": ["decode", "verify"],
            "device": "cuda",
            "arch": ["sm_90"],
            "kind": "mla",
            "dtypes": ["bfloat16"],
            "head_dims": [[576, 512]],
            "page_sizes": [64],
            "features": ["lse", "verify_chain"],
        }
    ],
}
HOPPER = System("cuda", "sm_90", forced=True)


@pytest.fixture
def decodes(target: Target) -> Target:
    """The stand-in on a Hopper that is not here: refusals need none."""
    ref = replace(target.ref, name="decodes", listed="decodes", manifest=Manifest.parse(DECODES))
    return Target(ref, HOPPER, target.device)


@pytest.mark.parametrize(
    "text",
    [
        "extend/mla:4x1x576-512+scale=0.1/4@0/page_size=64/layout=MLA",
        # another kind of attention is the reason, and the phase is lacking too
        "extend/8x2x64/4@0/page_size=64",
        "draft_extend/8x2x64/2@3/page_size=64",
        # the plan speaks of the decodes, since prefill has a fallback list, and prefill is what comes first
        "mixed/mla:4x1x576-512+scale=0.1+softcap=2.0/1@3,4@0/batch=2/page_size=64/layout=MLA",
        "mixed/8x2x64+sinks/1@3,4@0/batch=2/dtype=float32/page_size=64",
    ],
)
def test_a_phase_that_goes_to_others_is_refused_with_its_reason(text: str, decodes: Target) -> None:
    case = replace(Case.parse(text), refused="any")
    assert check_refusal(case, decodes, probe=False).faults == ()


def test_every_refusal_of_it_holds(decodes: Target) -> None:
    cases = refusal_cases(decodes.ref.manifest, "numerics", HOPPER)
    assert len(cases) > 30
    assert [c.id for c in cases if check_refusal(c, decodes, probe=False).faults] == []


def test_random_cases_of_it_are_refused(decodes: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_core.testing.fuzz.run_case", lambda case, target: Result(case, "passed"))
    results = run_share(Share(3, 60), decodes)
    assert [str(f) for r in results for f in r.faults] == []
    assert sum(bool(r.case.refused) for r in results) > 8


def test_a_plan_that_says_something_else_is_caught(decodes: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner evaluates through another door than the kit: here it finds another reason."""
    case = replace(
        Case.parse("decode/mla:4x1x576-512+scale=0.1/1@3/dtype=float16/page_size=64/layout=MLA"), refused="any"
    )
    assert check_refusal(case, decodes, probe=False).faults == ()

    def other(*given: Any) -> Any:
        decision = reasons.evaluate(*given)
        return replace(decision, reasons=(reason("arch_mismatch", "arch", "sm_90", "sm_80"),))

    monkeypatch.setattr("attn_core.planning.candidates.evaluate", other)
    (fault,) = check_refusal(case, decodes, probe=False).faults
    assert fault.message.startswith("plan names none of dtype_unsupported")
    monkeypatch.setattr(refusals, "evaluate", other)
    (fault,) = check_refusal(case, decodes, probe=False).faults
    assert fault.message == "refused decode for arch_mismatch, wanted one of dtype_unsupported"
