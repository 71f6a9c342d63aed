"""All liars, their manifests, and what the kit says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from attn_core.planning.discovery import register
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System
from attn_core.testing.blame import Blame, explain
from attn_core.testing.cases import Case
from attn_core.testing.extras import extra_cases
from attn_core.testing.generation import ladder_cases
from attn_core.testing.liars import masks, memory, scores, steps
from attn_core.testing.liars.base import FAR_OF_LIARS, LIARS, Liar
from attn_core.testing.run import Result, Target, run_case

#: The modules whose import registers the liars.
FAMILIES: Final = (scores, masks, memory, steps)

_SHARED: Final = ("sliding_window", "softcap", "sinks", "lse", "verify_chain", "verify_tree", "cross")
_PHASES: Final = ("prefill", "decode", "verify")


def manifest(liar: Liar) -> dict[str, Any]:
    """What a liar claims: little enough to try all of it quickly, and the feature that it breaks."""
    changes = dict(liar.clause)
    more = changes.pop("features", [])
    latent = changes.pop("mla", False)
    mha = {
        "phases": [*_PHASES],
        "device": "any",
        "kind": "mha",
        "dtypes": ["float32", "bfloat16"],
        "kv_dtypes": ["auto", "fp8_e4m3"],
        "head_dims": [[80, 64]] if latent else [[64, 64]],
        "page_sizes": [16],
        "kv_layouts": ["NHD", "HND"],
        "features": [*_SHARED, "bidirectional_spans", "ragged", *more],
        **changes,
    }
    mla = {**mha, "kind": "mla", "head_dims": [[80, 64]], "kv_layouts": ["MLA"], "features": [*_SHARED, *more]}
    return {
        "schema": 1,
        "name": liar.name,
        "protocol": ">=1.0,<2",
        "summary": liar.fault,
        "supports": [mha, mla] if latent else [mha],
    }


def cases(liar: Liar, claimed: Manifest, system: System) -> list[Case]:
    """The ladders of the first tier in the modes of the liar, and its extra cases; for who wraps, far pages too."""
    extras = extra_cases(claimed, "contract", system)
    if "far" in liar.breaks:
        extras += extra_cases(claimed, "stress", system, far=FAR_OF_LIARS)
    return [case for case in ladder_cases(claimed, "contract", system) + extras if case.mode in liar.modes]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the kit said of a liar."""

    liar: Liar
    results: tuple[Result, ...]
    blames: tuple[Blame, ...]

    @property
    def tried(self) -> int:
        return len(self.results)

    @property
    def caught(self) -> bool:
        return bool(self.blames)

    @property
    def named(self) -> bool:
        """Whether the first thing that is blamed is what the liar breaks, and nothing else is."""
        return self.caught and all(blame.feature in self.liar.breaks for blame in self.blames)


def examine(liar: Liar, system: System | None = None) -> Verdict:
    """What the kit finds: cases one step from the plainest are enough to catch a liar and to name its fault."""
    system = System("cpu") if system is None else system
    with register(liar.cls, manifest(liar)) as ref:
        target = Target(ref, system, torch.device("cpu"))
        results = tuple(run_case(case, target) for case in cases(liar, ref.manifest, system))
    return Verdict(liar, results, tuple(explain(results)))


def liars() -> Mapping[str, Liar]:
    """Every liar by name."""
    return dict(LIARS)
