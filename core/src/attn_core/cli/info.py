"""`attn info`: one backend's manifest in words, with where it comes from and what was proved of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click

from attn_core.cli.output import note, print_json
from attn_core.cli.params import BACKEND
from attn_core.planning.config import FEATURES
from attn_core.planning.discovery import BackendRef, discover
from attn_core.planning.manifest import PROTOCOL_VERSION, Clause
from attn_core.planning.reasons import Reason, availability
from attn_core.planning.system import System, detect
from attn_core.testing.matrix import Row, matrix
from attn_core.testing.proof import evidence_folders, read_evidence

_KINDS: Final = {"mha": "multi-head attention", "mla": "multi-head latent attention (MLA)"}


@click.command()
@click.argument("name", type=BACKEND)
@click.option("--json", "as_json", is_flag=True, help="As JSON, schema attn/info.")
def command(name: str, as_json: bool) -> None:
    """All that the backend NAME claims, clause by clause, and what was proved of it."""
    installed, system = discover(), detect()
    ref = installed.find(name)
    runs, problems = read_evidence(evidence_folders([ref]))
    for problem in problems:
        note(f"evidence: {problem}")
    (row,) = matrix([ref], runs)
    reasons = availability(ref.manifest, system)
    if as_json:
        print_json("info", _to_json(ref, row, reasons))
    else:
        print("\n".join(_lines(ref, row, reasons, system)))


def _lines(ref: BackendRef, row: Row, reasons: tuple[Reason, ...], system: System) -> Iterator[str]:
    manifest = ref.manifest
    yield f"{ref.listed}: {manifest.summary}"
    yield f"  distribution  {ref.dist} {ref.version}"
    yield f"  class         {ref.object}"
    yield f"  manifest      {ref.location or 'given to register()'}, schema {manifest.schema}"
    yield f"  protocol      {manifest.protocol}; this core speaks {PROTOCOL_VERSION}"
    for requirement in manifest.requires_dists:
        found = ", ".join(f"{name} {version}" for name, version in requirement.found(system.dists).items())
        yield f"  needs         {requirement}: {f'found {found}' if found else 'not installed'}"
    if manifest.needs_host_lengths:
        yield "  needs         the lengths of a batch on the host as well (seq_lens_cpu, query_start_loc_cpu)"
    yield f"  on {system}".ljust(16) + ("usable" if not reasons else "; ".join(map(str, reasons)))
    for phase, names in manifest.fallback.items():
        yield f"  fallback      {phase} goes to {', then '.join(names)}: this backend has none"
    for number, clause in enumerate(manifest.clauses, 1):
        yield ""
        yield f"clause {number}: {', '.join(clause.phases)} on {_where(clause)}"
        yield from (f"  {line}" for line in _words(clause))
    yield ""
    yield "features:"
    yield from (f"  {name.ljust(20)} {str(cell).ljust(10)}  {FEATURES[name]}" for name, cell in row.features.items())


def _where(clause: Clause) -> str:
    devices = "any device" if "any" in clause.devices else " or ".join(clause.devices)
    return f"{devices}, {clause.arch}" if clause.arch.alternatives else devices


def _words(clause: Clause) -> Iterator[str]:
    yield f"{_KINDS[clause.kind]} in {', '.join(clause.dtypes)}, head widths (keys/values) {clause.head_dims}"
    if clause.cached:
        cache = ", ".join("as the queries" if dtype == "auto" else dtype for dtype in clause.kv_dtypes)
        pages = "any size" if str(clause.pages) == "any" else str(clause.pages)
        yield f"cache: {cache}; pages of {pages}; layout {' or '.join(clause.kv_layouts)}"
    else:
        yield "no cache: keys and values are given (ragged)"
    if clause.max_group_size is not None:
        yield f"at most {clause.max_group_size} query heads for each KV head"
    if clause.max_draft_tokens is not None:
        yield f"at most {clause.max_draft_tokens} draft tokens"
    if clause.quantizes_query:
        yield "with an fp8 cache, queries and probabilities are rounded to fp8 as well"
    has = [name for name in FEATURES if name in clause.features]
    yield f"with {', '.join(has)}" if has else "with none of the optional features"


def _to_json(ref: BackendRef, row: Row, reasons: tuple[Reason, ...]) -> dict[str, Any]:
    manifest = ref.manifest
    return {
        "name": ref.listed,
        "distribution": ref.dist,
        "distribution_version": ref.version,
        "object": ref.object,
        "manifest": ref.location,
        "summary": manifest.summary,
        "protocol": str(manifest.protocol),
        "requires": [str(requirement) for requirement in manifest.requires_dists],
        "host_lengths": manifest.needs_host_lengths,
        "fallback": {phase: list(names) for phase, names in manifest.fallback.items()},
        "usable": not reasons,
        "reasons": [reason.to_json() for reason in reasons],
        "clauses": [_clause_json(clause) for clause in manifest.clauses],
        "headline": {name: cell.to_json() for name, cell in row.flags.items()},
        "features": {name: cell.to_json() for name, cell in row.features.items()},
    }


def _clause_json(clause: Clause) -> dict[str, Any]:
    return {
        "phases": list(clause.phases),
        "devices": list(clause.devices),
        "arch": str(clause.arch),
        "kind": clause.kind,
        "dtypes": list(clause.dtypes),
        "kv_dtypes": list(clause.kv_dtypes),
        "head_dims": str(clause.head_dims),
        "page_sizes": str(clause.pages) if clause.cached else None,
        "kv_layouts": list(clause.kv_layouts),
        "features": sorted(clause.features),
        "max_group_size": clause.max_group_size,
        "max_draft_tokens": clause.max_draft_tokens,
        "quantizes_query": clause.quantizes_query,
    }
