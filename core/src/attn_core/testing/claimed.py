"""What a clause leaves a case without: the kit's own reading of a manifest, apart from the planner's.

`evaluate` decides what runs; this says what it should have decided, so that the two can disagree.
"""

from __future__ import annotations

from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.manifest import Clause, Manifest
from attn_core.planning.system import System
from attn_core.testing.cases import Case


def unmet(clause: Clause, config: AttentionConfig, kind: LayerKind, phase: Phase, system: System) -> frozenset[str]:
    """The reason codes for which this clause does not take layers of ``kind`` in ``phase``; empty if it does."""
    checks = {
        "device_mismatch": system.device in clause.devices or "any" in clause.devices,
        "arch_mismatch": clause.arch.allows(system.arch),
        "phase_unsupported": phase in clause.phases,
        "kind_unsupported": kind.kind == clause.kind and (kind.ragged or clause.cached),
        "dtype_unsupported": config.dtype in clause.dtypes,
        "kv_dtype_unsupported": kind.ragged or config.kv_cache_dtype in clause.kv_dtypes,
        "head_dim_unsupported": clause.head_dims.allows(kind.qk_head_dim, kind.v_head_dim),
        "group_size_unsupported": clause.max_group_size is None or kind.group_size <= clause.max_group_size,
        "kv_layout_unsupported": kind.ragged or config.kv_layout in clause.kv_layouts,
        "page_size_unsupported": kind.ragged or _serves_pages(clause, config),
        "feature_unsupported": config.features(kind, phase) <= clause.features,
        "draft_tokens_unsupported": phase != "verify"
        or clause.max_draft_tokens is None
        or config.speculative_num_draft_tokens <= clause.max_draft_tokens,
    }
    return frozenset(code for code, holds in checks.items() if not holds)


def _serves_pages(clause: Clause, config: AttentionConfig) -> bool:
    """Natively, or by splitting the pages; those of HND cannot be split."""
    size = config.page_size
    if size is None or clause.pages.allows(size):
        return True
    return config.kv_layout != "HND" and any(size % n == 0 for n in range(1, size) if clause.pages.allows(n))


def is_claimed(manifest: Manifest, case: Case, system: System) -> bool:
    """Whether for each layer kind of the case some clause takes all of it, in every phase of the case."""
    return not missing_codes(manifest, case, system)


def missing_codes(manifest: Manifest, case: Case, system: System) -> frozenset[str]:
    """Every code for which some clause does not take a layer kind that no clause takes; empty if all are taken."""
    config = case.config()
    codes: frozenset[str] = frozenset()
    for phase in case.phases:
        for kind in config.kinds(phase):
            lacks = [unmet(clause, config, kind, phase, system) for clause in manifest.clauses]
            if all(lacks):
                codes = codes.union(*lacks)
    return codes
