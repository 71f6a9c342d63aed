"""Every liar is caught, and what it breaks is named; the honest backend they are made of passes the same cases."""

from __future__ import annotations

import pytest
import torch
from attn_core.planning.discovery import register
from attn_core.planning.system import System
from attn_core.testing.liars.base import Liar, Mutant
from attn_core.testing.liars.registry import cases, examine, liars, manifest
from attn_core.testing.run import Target, run_case


def test_there_are_enough_of_them_and_each_says_what_is_wrong() -> None:
    assert len(liars()) >= 30
    assert all(liar.fault.endswith((".", "!")) and liar.breaks for liar in liars().values())


@pytest.mark.parametrize("name", sorted(liars()))
def test_a_liar_is_caught_and_named(name: str) -> None:
    verdict = examine(liars()[name])
    assert verdict.caught, f"{verdict.liar.fault} passes {verdict.tried} cases"
    assert verdict.named, f"{verdict.liar.fault} is called {[str(b) for b in verdict.blames]}"


def test_what_liars_are_made_of_is_honest() -> None:
    class LiarHonest(Mutant):
        """No fault."""

        name = "liar_honest"

    honest = Liar(LiarHonest, ("verify_tree", "ragged", "far"), {"mla": True})
    with register(LiarHonest, manifest(honest)) as ref:
        target = Target(ref, System("cpu"), torch.device("cpu"))
        tried = cases(honest, ref.manifest, target.system)
        wrong = [r.case.id for case in tried if (r := run_case(case, target)).faults]
    assert wrong == []
