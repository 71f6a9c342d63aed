"""What works and is not declared: every feature that its refused cases could have is tried with everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from attn_core.planning.config import FEATURES
from attn_core.planning.manifest import Clause, Manifest
from attn_core.planning.system import System
from attn_core.testing.axes import Tier
from attn_core.testing.cases import Case
from attn_core.testing.claimed import is_claimed
from attn_core.testing.generation import generate_cases, spread
from attn_core.testing.run import Result

#: Cases that try one feature.
MOST_PROBES: Final = 250


def features_to_probe(results: Sequence[Result]) -> list[str]:
    """The features of which every refused case that was tried all the same gave the right answer."""
    found = []
    for feature in FEATURES:
        mine = [r for r in results if r.case.refused == "feature_unsupported" and feature in r.case.features]
        if mine and all(r.works_undeclared for r in mine):
            found.append(feature)
    return found


def probes(manifest: Manifest, features: Iterable[str], tier: Tier, system: System, seed: int = 0) -> list[Case]:
    """The cases that would prove each feature if it were declared; as they are, all of them must be refused."""
    found: dict[Case, None] = {}
    for feature in features:
        wider = replace(manifest, clauses=tuple(_with(clause, feature, system) for clause in manifest.clauses))
        cases = [c for c in generate_cases(wider, tier, system, seed) if feature in c.features]
        undeclared = [c for c in cases if not is_claimed(manifest, c, system)]
        refused = (replace(c, refused="feature_unsupported") for c in spread(undeclared, MOST_PROBES))
        found |= dict.fromkeys(refused)
    return list(found)


def _with(clause: Clause, feature: str, system: System) -> Clause:
    """The clause with the feature, if it is one of this machine."""
    here = system.device in clause.devices or "any" in clause.devices
    return replace(clause, features=clause.features | {feature}) if here else clause
