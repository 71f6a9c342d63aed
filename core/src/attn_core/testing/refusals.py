"""The other direction: what no clause claims must be refused, with a reason that fits, before anything is built."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from attn_core.errors import PlanError
from attn_core.planning.claims import HeadDims, PageSet
from attn_core.planning.config import DTYPES, FEATURES, KV_DTYPES, PHASES
from attn_core.planning.manifest import Clause, Manifest
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.testing import axes
from attn_core.testing.axes import Tier
from attn_core.testing.cases import Case, Mode
from attn_core.testing.checks import Fault
from attn_core.testing.claimed import is_claimed, missing_codes
from attn_core.testing.generation import SOFTCAP, Ground, several_requests, with_encoders
from attn_core.testing.run import Result, Target, run_case

#: The mode that stands for each phase.
_MODE_OF: Final[dict[str, Mode]] = {
    "prefill": "extend",
    "decode": "decode",
    "verify": "verify",
    "draft": "draft_extend",
}
_UNUSUAL_PAGES: Final = (48, 17, 3, 1, 16)


def refusal_cases(manifest: Manifest, tier: Tier, system: System, seed: int = 0) -> list[Case]:
    """Cases one step beyond each clause of this machine, in every phase, that no clause claims: all must be refused."""
    found: dict[Case, None] = {}
    for clause in manifest.clauses:
        here = system.device in clause.devices or "any" in clause.devices
        if not (here and clause.arch.allows(system.arch) and clause.cached):
            continue
        for phase in PHASES:
            for tree in ("", "top2") if phase == "verify" else ("",):
                ground = Ground(manifest, clause, system, tier, _MODE_OF[phase], tree, seed)
                found |= dict.fromkeys(_beyond(ground))
    return [case for case in found if not is_claimed(manifest, case, system)]


def _beyond(ground: Ground) -> Iterator[Case]:
    """The plain case with one thing that the clause lacks. What another clause has is sorted out by the caller."""
    plain, clause = ground.plain(), ground.clause
    if not {*plain.phases} <= {*clause.phases}:
        yield replace(plain, refused="phase_unsupported")
        return
    for feature in sorted({*FEATURES} - clause.features):
        case = _with_feature(plain, feature)
        if case is not None:
            yield replace(case, refused="feature_unsupported")
    for dtype in DTYPES:
        if dtype not in clause.dtypes:
            yield replace(plain, dtype=dtype, refused="dtype_unsupported")
    for kv_dtype in KV_DTYPES:
        if kv_dtype not in clause.kv_dtypes:
            yield replace(plain, kv_dtype=kv_dtype, refused="kv_dtype_unsupported")
    for layout in ("NHD", "HND") if clause.kind == "mha" else ():
        if layout not in clause.kv_layouts:
            yield replace(plain, layout=layout, refused="kv_layout_unsupported")
    yield from _beyond_sizes(plain, clause)


def _beyond_sizes(plain: Case, clause: Clause) -> Iterator[Case]:
    kind = plain.kinds[0]
    widths = axes.undeclared_head_dims(clause.head_dims, clause.kind)
    if widths is not None:
        wider = axes.layer_kind(clause, widths, kind.group_size)
        yield replace(plain, kinds=(wider,), refused="head_dim_unsupported")
    if clause.max_group_size is not None:
        larger = axes.layer_kind(clause, (kind.qk_head_dim, kind.v_head_dim), clause.max_group_size + 1)
        yield replace(plain, kinds=(larger,), refused="group_size_unsupported")
    page = next((n for n in _UNUSUAL_PAGES if not clause.pages.allows(n)), None)
    if page is not None:
        yield replace(plain, page_size=page, refused="page_size_unsupported")


def _with_feature(plain: Case, feature: str) -> Case | None:
    """``plain`` with one feature more, None where the mode cannot have it."""
    kind, options = plain.kinds[0], {"lse": "lse", "deterministic": "twice", "batch_invariant": "alone"}
    if feature in options:
        return replace(several_requests(plain), options=plain.options | {options[feature]})
    if feature in ("sliding_window", "softcap", "sinks"):
        changes = {"sliding_window": plain.page_size, "softcap": SOFTCAP, "sinks": True}
        return replace(plain, kinds=(replace(kind, **{feature: changes[feature]}),))  # type: ignore[arg-type]
    if feature == "cross":
        return with_encoders(replace(plain, kinds=(replace(kind, cross=True),)))
    if feature == "bidirectional_spans" and plain.mode == "extend":
        return replace(plain, options=plain.options | {"spans"})
    if feature == "cuda_graph" and plain.mode != "extend":
        return replace(several_requests(plain), options=plain.options | {"graph"})
    if feature == "ragged" and plain.mode == "extend" and kind.kind == "mha":
        return replace(plain, mode="ragged", kinds=(kind, replace(kind, ragged=True)))
    wanted = {"verify_chain": "", "verify_tree": "top2"}
    return plain if plain.mode == "verify" and wanted.get(feature) == plain.tree else None


def check_refusal(case: Case, target: Target, *, probe: bool) -> Result:
    """Whether the case is refused as the manifest says, and whether it works all the same if ``probe`` asks for it."""
    begun = time.perf_counter()
    modules = set(sys.modules)
    faults = _refusal_faults(case, target)
    own = target.ref.object.partition(":")[0]
    if own in set(sys.modules) - modules:
        faults.append(Fault("not_refused", f"{own} was imported to refuse it"))
    if "graph" in case.options and target.device.type == "cpu":
        probe = False  # a CPU has no graphs that could work
    works = bool(probe and not faults and run_widened(case, target).status == "passed")
    return Result(case, "failed" if faults else "passed", tuple(faults), "", time.perf_counter() - begun, works)


def _refusal_faults(case: Case, target: Target) -> list[Fault]:
    manifest, config = target.ref.manifest, case.config()
    fitting = missing_codes(manifest, case, target.system)
    decisions = [evaluate(manifest, config, phase, target.system) for phase in case.phases]
    refused = [decision for decision in decisions if not decision.accepted]
    if not refused:
        return [Fault("not_refused", f"evaluate accepts it, and no clause claims it ({', '.join(sorted(fitting))})")]
    roots = {decision.phase: decision.reasons[0].code for decision in refused}
    astray = {phase: code for phase, code in roots.items() if code not in fitting}
    if astray:
        found = ", ".join(f"{phase} for {code}" for phase, code in astray.items())
        return [Fault("not_refused", f"refused {found}, wanted one of {', '.join(sorted(fitting))}")]
    try:
        target.plan(case)
    except PlanError as error:
        # a plan says what stands against one phase, and need not begin with the first
        if any(f"{code}:" in str(error) for code in roots.values()):
            return []
        return [Fault("not_refused", f"plan names none of {', '.join(sorted({*roots.values()}))}: {error}")]
    return [Fault("not_refused", f"plan accepts what evaluate refuses for {', '.join(sorted({*roots.values()}))}")]


def run_widened(case: Case, target: Target) -> Result:
    """The case, run as if the manifest claimed it."""
    # what is for given keys alone stays so: with a layout it would have a cache, and no pages
    clauses = tuple(_widened(clause, case) if clause.cached else clause for clause in target.ref.manifest.clauses)
    manifest = replace(target.ref.manifest, clauses=clauses)
    return run_case(replace(case, refused=""), replace(target, ref=replace(target.ref, manifest=manifest)))


def _widened(clause: Clause, case: Case) -> Clause:
    match case.refused:
        case "feature_unsupported":
            return replace(clause, features=clause.features | case.features)
        case "dtype_unsupported":
            return replace(clause, dtypes=(*clause.dtypes, case.dtype))
        case "kv_dtype_unsupported":
            return replace(clause, kv_dtypes=(*clause.kv_dtypes, case.kv_dtype))
        case "kv_layout_unsupported":
            return replace(clause, kv_layouts=(*clause.kv_layouts, case.layout))
        case "head_dim_unsupported":
            return replace(clause, head_dims=HeadDims())
        case "group_size_unsupported":
            return replace(clause, max_group_size=None)
        case "page_size_unsupported":
            return replace(clause, pages=PageSet())
        case _:
            return replace(clause, phases=PHASES)
