"""Kernels that compute in e4m3: honest ones are inside the tolerances, a fault on top of the rounding is outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.planning.discovery import register
from attn_core.planning.system import System
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.blame import explain
from attn_core.testing.cases import Case
from attn_core.testing.generation import ladder_cases
from attn_core.testing.run import Target, run_case

from .fp8_kernel import MANIFEST, Fp8Kernel, PlainFp8Kernel

CPU = System("cpu")

#: What honest kernels were outside of while one run of the rounded maths stood for all of them.
ONCE_OUTSIDE = [
    "extend/8x2x64/32@0/kv_dtype=fp8_e4m3/hot",
    "extend/16x2x80+window=1+sinks/32@0/kv_dtype=fp8_e4m3/memory=interleaved/seed=1/hot/fused/nosave/nohost/loose",
    "extend/6x2x80+window=8/1@0,63@0,64@1,65@63,3@64,2@129,1@64/batch=7/kv_dtype=fp8_e4m3/page_size=64/seed=1/hot",
    "extend/16x2x128+window=16+sinks/2@0,4@0/batch=2/kv_dtype=fp8_e4m3/page_size=2/memory=shuffled/seed=1/lse/hot",
    "decode/32x2x128+softcap=1.5+sinks+cross/1@0e2,1@3e1,1@4e5,1@5e1,1@19e1,1@1e2,1@9e1/batch=7/kv_dtype=fp8_e4m3"
    "/page_size=1/memory=shuffled/seed=1/out/hot/fused/joined/loose",
    "verify/16x2x64+window=8/5@5,5@10/batch=2/kv_dtype=fp8_e4m3/page_size=1/tree=top2dead/seed=1/hot",
    "verify/32x2x256+window=1+softcap=1.5+sinks/5@1,5@4,5@5/batch=9/kv_dtype=fp8_e4m3/page_size=1/seed=1/lse/hot",
    "draft_extend/8x2x128+window=16/2@30/kv_dtype=fp8_e4m3/layout=HND/memory=shuffled/seed=1/out/hot/loose",
]


@contextmanager
def installed(cls: type[Fp8Kernel]) -> Iterator[Target]:
    """The backend as a target on this CPU."""
    with register(cls, {**MANIFEST, "name": cls.name}) as ref:
        yield Target(ref, CPU, torch.device("cpu"))


@pytest.mark.parametrize("cls", [Fp8Kernel, PlainFp8Kernel])
@pytest.mark.parametrize("text", ONCE_OUTSIDE)
def test_an_honest_kernel_is_inside(text: str, cls: type[Fp8Kernel]) -> None:
    with installed(cls) as target:
        assert run_case(Case.parse(text), target).faults == ()


def test_without_the_manifests_word_it_is_outside() -> None:
    with installed(Fp8Kernel) as target:
        clauses = tuple(replace(clause, quantizes_query=False) for clause in target.ref.manifest.clauses)
        silent = replace(target.ref, manifest=replace(target.ref.manifest, clauses=clauses))
        result = run_case(Case.parse("extend/8x2x64/32@0/kv_dtype=fp8_e4m3"), replace(target, ref=silent))
    assert {fault.check for fault in result.faults} == {"output"}


def wider(window: int | None, by: int) -> int | None:
    """A window of so many keys more, and of one key at least."""
    return None if window is None else max(1, window + by)


FAULTS: dict[str, tuple[str, Callable[[AttentionLayer], dict[str, Any]]]] = {
    "window_one_more": ("sliding_window", lambda layer: {"sliding_window": wider(layer.sliding_window, 1)}),
    "window_one_less": ("sliding_window", lambda layer: {"sliding_window": wider(layer.sliding_window, -1)}),
    "softcap_dropped": ("softcap", lambda layer: {"softcap": 0.0}),
    "sink_dropped": ("sinks", lambda layer: {"sinks": None}),
    "key_scale_dropped": ("attention", lambda layer: {"k_scale": 1.0}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_outside_all_the_same(name: str) -> None:
    feature, changes = FAULTS[name]

    class Faulty(Fp8Kernel):
        def alter(self, layer: AttentionLayer) -> AttentionLayer:
            return replace(layer, **changes(layer))

    Faulty.name = f"fp8_{name}"
    with installed(Faulty) as target:
        every = ladder_cases(target.ref.manifest, "contract", CPU)
        cases = [case for case in every if case.mode in ("extend", "decode") and case.batch == 1]
        blames = explain(run_case(case, target) for case in cases)
    assert blames
    assert {blame.feature for blame in blames} == {feature}
