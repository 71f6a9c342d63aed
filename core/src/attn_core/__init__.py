"""attn: the plugin layer for attention kernels in LLM serving.

``attn_core.plan`` says which backend runs each phase and why, ``attn_core.build`` makes them, and the other names here
are what an engine and a backend speak. Each is loaded when first used: ``import attn_core`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from attn_core.errors import AttnError as AttnError
    from attn_core.planning.config import AttentionConfig as AttentionConfig
    from attn_core.planning.config import LayerKind as LayerKind
    from attn_core.planning.config import Phase as Phase
    from attn_core.planning.discovery import BackendRef as BackendRef
    from attn_core.planning.discovery import discover as discover
    from attn_core.planning.discovery import register as register
    from attn_core.planning.discovery import unregister as unregister
    from attn_core.planning.hooks import FallbackEvent as FallbackEvent
    from attn_core.planning.hookspecs import hookimpl as hookimpl
    from attn_core.planning.manifest import Manifest as Manifest
    from attn_core.planning.plan import Plan as Plan
    from attn_core.planning.plan import plan as plan
    from attn_core.planning.reasons import Decision as Decision
    from attn_core.planning.reasons import Reason as Reason
    from attn_core.planning.reasons import evaluate as evaluate
    from attn_core.planning.system import System as System
    from attn_core.runtime.backend import AttentionBackend as AttentionBackend
    from attn_core.runtime.batch import ForwardBatch as ForwardBatch
    from attn_core.runtime.batch import ForwardMode as ForwardMode
    from attn_core.runtime.batch import TreeMask as TreeMask
    from attn_core.runtime.build import build as build
    from attn_core.runtime.build import settle as settle
    from attn_core.runtime.graph_batch import GraphShape as GraphShape
    from attn_core.runtime.graphs import GraphRunner as GraphRunner
    from attn_core.runtime.kv_cache import KVCache as KVCache
    from attn_core.runtime.kv_cache import PageAllocator as PageAllocator
    from attn_core.runtime.layer import AttentionLayer as AttentionLayer
    from attn_core.runtime.merge_state import merge_state as merge_state
    from attn_core.runtime.router import PhaseRouter as PhaseRouter
    from attn_core.runtime.witness import Witness as Witness

#: Where each public name lives.
_HOMES: Final = {
    "AttentionBackend": "runtime.backend",
    "AttentionConfig": "planning.config",
    "AttentionLayer": "runtime.layer",
    "AttnError": "errors",
    "BackendRef": "planning.discovery",
    "Decision": "planning.reasons",
    "FallbackEvent": "planning.hooks",
    "ForwardBatch": "runtime.batch",
    "ForwardMode": "runtime.batch",
    "GraphRunner": "runtime.graphs",
    "GraphShape": "runtime.graph_batch",
    "KVCache": "runtime.kv_cache",
    "LayerKind": "planning.config",
    "Manifest": "planning.manifest",
    "PageAllocator": "runtime.kv_cache",
    "Phase": "planning.config",
    "PhaseRouter": "runtime.router",
    "Plan": "planning.plan",
    "Reason": "planning.reasons",
    "System": "planning.system",
    "TreeMask": "runtime.batch",
    "Witness": "runtime.witness",
    "build": "runtime.build",
    "discover": "planning.discovery",
    "evaluate": "planning.reasons",
    "hookimpl": "planning.hookspecs",
    "merge_state": "runtime.merge_state",
    "plan": "planning.plan",
    "register": "planning.discovery",
    "settle": "runtime.build",
    "unregister": "planning.discovery",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
