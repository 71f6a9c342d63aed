"""How a plan is shown: as text for people, as data for tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from attn_core.planning.candidates import Candidate
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import PhasePlan, Plan
from attn_core.planning.reasons import Reason


def explain(plan: Plan) -> str:
    """The plan, then for each phase every candidate with what became of it."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    config = plan.config
    here = " (not this machine: libraries are not judged)" if plan.system.forced else ""
    yield f"{config.model or 'config'} on {plan.system}{here}"
    yield f"cache   page size {config.page_size}, layout {config.kv_layout}, {_cache_dtype(config)}"
    for i, kind in enumerate(config.layers):
        yield f"layers  {i}: {describe_kind(kind)}"
    yield ""
    yield from _table([_chosen(phase) for phase in plan.phases.values()])
    for note in plan.notes:
        yield f"note: {note}"
    for phase, candidates in plan.trace.items():
        yield ""
        yield f"{phase}: {len(candidates)} candidates"
        yield from (line for candidate in candidates for line in _candidate(candidate, plan))


def _cache_dtype(config: AttentionConfig) -> str:
    return config.dtype if config.kv_cache_dtype == "auto" else f"{config.kv_cache_dtype} (computed in {config.dtype})"


def describe_kind(kind: LayerKind) -> str:
    """One line about a layer kind."""
    words = [
        f"{len(kind.layer_ids)} x {kind.kind}" if kind.layer_ids else kind.kind,
        f"{kind.num_q_heads}/{kind.num_kv_heads} heads",
        f"width {kind.qk_head_dim}" + ("" if kind.v_head_dim == kind.qk_head_dim else f"/{kind.v_head_dim}"),
    ]
    words += [f"window {kind.sliding_window}"] if kind.sliding_window is not None else []
    words += [f"softcap {kind.softcap:g}"] if kind.softcap else []
    words += [name for name in ("sinks", "cross", "ragged") if getattr(kind, name)]
    words += ["not causal"] if not kind.causal else []
    return ", ".join(words)


def _chosen(phase: PhasePlan) -> list[str]:
    ref = phase.backend
    pages = f"pages of {phase.page_size} read as {phase.native_page_size}" if phase.converted else "native pages"
    why = f"fallback: {' -> '.join(phase.fallback)}" if phase.fallback else phase.why
    return [phase.phase, ref.listed, f"{ref.dist} {ref.version}".strip(), pages, why]


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _candidate(candidate: Candidate, plan: Plan) -> Iterator[str]:
    width = max(len(row.listed) for rows in plan.trace.values() for row in rows)
    indent = f"  {'':{width}}  {'':13}  "
    lines = _reasons(candidate.reasons) + ([candidate.note] if candidate.note else [])
    if candidate.decision is not None and candidate.status == "chosen":
        lines += [f"not judged here: {note}" for note in candidate.decision.notes]
    first, *rest = lines or [""]
    yield f"  {candidate.listed:{width}}  {candidate.status.replace('_', ' '):13}  {first}".rstrip()
    yield from (indent + line for line in rest)


def _reasons(reasons: Iterable[Reason]) -> list[str]:
    """One line for each thing that stands against it, naming all the layer kinds it stands against it for."""
    kinds: dict[Reason, list[int]] = {}
    for reason in reasons:
        kinds.setdefault(replace(reason, kind=None), []).extend([] if reason.kind is None else [reason.kind])
    return [reason.text(found) for reason, found in kinds.items()]


def plan_json(plan: Plan) -> dict[str, Any]:
    """JSON data of the schema ``attn/plan``, version 1."""
    return {
        "schema": "attn/plan",
        "version": 1,
        "model": plan.config.model or None,
        "system": {"device": plan.system.device, "arch": plan.system.arch, "forced": plan.system.forced},
        "page_size": plan.config.page_size,
        "kv_layout": plan.config.kv_layout,
        "dtype": plan.config.dtype,
        "kv_cache_dtype": plan.config.kv_cache_dtype,
        "layers": [describe_kind(kind) for kind in plan.config.layers],
        "phases": {name: _phase_json(phase) for name, phase in plan.phases.items()},
        "trace": {name: [candidate.to_json() for candidate in rows] for name, rows in plan.trace.items()},
        "notes": list(plan.notes),
    }


def _phase_json(phase: PhasePlan) -> dict[str, Any]:
    return {
        "backend": phase.backend.listed,
        "dist": phase.backend.dist,
        "version": phase.backend.version or None,
        "native_page_size": phase.native_page_size,
        "converted": phase.converted,
        "why": phase.why,
        "fallback": list(phase.fallback),
        "clauses": list(phase.decision.clauses),
    }
