"""Plan -> backends: loads the chosen plugins and nothing else, asks what their builds lack, joins them in a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attn_core.errors import BackendRefusedError, ConfigError, UsageError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.discovery import Installed
from attn_core.planning.plan import PhasePlan, Plan
from attn_core.planning.plan import plan as make_plan
from attn_core.planning.reasons import Reason
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.conversion import PageTableConversion
from attn_core.runtime.kv_cache import KVCache, cache_dtype
from attn_core.runtime.loading import call_plugin, load_backend
from attn_core.runtime.router import PhaseRouter, Role

Refusals = Mapping[tuple[str, Phase], Sequence[Reason]]


def build(plan: Plan, kv_cache: KVCache, *, role: Role = "target", installed: Installed | None = None) -> PhaseRouter:
    """What runs ``plan`` over ``kv_cache``: one instance for each chosen backend, behind one protocol.

    ``role="draft"`` is for the draft model of speculative decoding: its decodes are the phase `draft`.
    The result's ``plan`` is the one that stands (see ``settle``).

    Raises ConfigError for a cache that is not what was planned, UsageError for what is no plan, and what ``settle``
    raises. A backend whose constructor fails is a PluginLoadError.
    """
    if not isinstance(plan, Plan):
        raise UsageError(f"build() of a {type(plan).__name__}", accepted="what attn_core.plan(config) gives")
    plan = settle(plan, installed=installed)
    check_cache(plan.config, kv_cache)
    instances: dict[tuple[str, int], AttentionBackend] = {}
    backends: dict[Phase, AttentionBackend] = {}
    for phase, chosen in plan.phases.items():
        key = chosen.backend.listed, chosen.native_page_size
        if key not in instances:
            instances[key] = _instance(chosen, plan.config, kv_cache)
        backends[phase] = instances[key]
    return PhaseRouter(plan, backends, kv_cache, role=role)


def settle(plan: Plan, *, installed: Installed | None = None) -> Plan:
    """``plan``, if the installed builds of the chosen kernel libraries can do what their manifests say.

    Where one cannot and the phase was chosen by `auto`, the plan is made again without it, and its reasons are in the
    trace; page size and layout stay. Each round leaves out one more backend, so this ends.
    Raises BackendRefusedError for a named backend, NoBackendError if nothing is left, PluginLoadError or ProtocolError
    for a plugin that cannot be loaded. ``installed`` is what the plan was made from, if not what is discovered here.
    """
    refused: dict[tuple[str, Phase], Sequence[Reason]] = {}
    while True:
        found = {
            (chosen.backend.listed, phase): reasons
            for phase, chosen in plan.phases.items()
            if (reasons := _build_reasons(chosen, plan.config))
        }
        if not found:
            return plan
        for (_, phase), reasons in found.items():
            if plan.phases[phase].named:
                raise _refusal(plan.phases[phase], reasons)
        refused |= found
        plan = _without(plan, refused, installed)


def check_cache(config: AttentionConfig, kv_cache: KVCache) -> None:
    """Raise ConfigError unless ``kv_cache`` is what ``config``, with its page size and layout decided, asks for."""
    wanted = (config.page_size, config.kv_layout, cache_dtype(config))
    given = (kv_cache.page_size, kv_cache.layout, kv_cache.dtype)
    if wanted != given:
        raise ConfigError(
            f"a {given[1]} cache of {given[2]} in pages of {given[0]}",
            given=given,
            accepted=f"what was planned: {wanted[1]}, {wanted[2]}, pages of {wanted[0]}",
            hint="KVCache.allocate(plan.config, ...) makes it",
        )
    for kind in config.cached_kinds:
        for layer_id in kind.layer_ids or kv_cache.layer_ids:
            _check_layer(kind, layer_id, kv_cache)


def _check_layer(kind: LayerKind, layer_id: int, kv_cache: KVCache) -> None:
    if layer_id not in kv_cache.layer_ids:
        raise ConfigError(f"a cache without layer {layer_id}", accepted=f"layers {kind.layer_ids}, as planned")
    k, v = kv_cache.k_nhd(layer_id), kv_cache.v_nhd(layer_id, kind.v_head_dim)
    shapes = tuple(k.shape[2:]), tuple(v.shape[2:])
    planned = (kind.num_kv_heads, kind.qk_head_dim), (kind.num_kv_heads, kind.v_head_dim)
    if shapes != planned:
        raise ConfigError(
            f"layer {layer_id}: a cache of (heads, width) {shapes[0]} for keys and {shapes[1]} for values",
            accepted=f"{planned[0]} and {planned[1]}, as planned",
        )


def _native(config: AttentionConfig, page_size: int) -> AttentionConfig:
    """The config as a backend sees it that is given pages of ``page_size``."""
    return config if config.page_size == page_size else config.replace(page_size=page_size)


def _instance(chosen: PhasePlan, config: AttentionConfig, kv_cache: KVCache) -> AttentionBackend:
    """The backend over the cache, or over the cache seen in its own pages and converted to them."""
    ref, size = chosen.backend, chosen.native_page_size
    cls = load_backend(ref)
    cache = kv_cache.with_page_size(size) if chosen.converted else kv_cache
    backend = call_plugin(ref, "constructing it", lambda: cls(_native(config, size), cache))
    return PageTableConversion(backend, kv_cache) if chosen.converted else backend


def _build_reasons(chosen: PhasePlan, config: AttentionConfig) -> tuple[Reason, ...]:
    cls = load_backend(chosen.backend)
    native = _native(config, chosen.native_page_size)
    return call_plugin(
        chosen.backend, "asking its build_reasons", lambda: tuple(cls.build_reasons(native, chosen.phase))
    )


def _refusal(chosen: PhasePlan, reasons: Sequence[Reason]) -> BackendRefusedError:
    return BackendRefusedError(
        f"the installed build of backend {chosen.backend.listed!r} cannot run {chosen.phase}",
        given=chosen.backend.listed,
        trace=[f"  {reason}" for reason in reasons],
        hint="attn explain shows what else could; --attention-backend auto chooses it",
    )


def _without(plan: Plan, refused: Refusals, installed: Installed | None) -> Plan:
    """The plan made again on the same cache: what was named stays named, the rest is chosen without ``refused``."""
    named: dict[Phase, str] = {
        phase: chosen.fallback[0] if chosen.fallback else chosen.backend.listed
        for phase, chosen in plan.phases.items()
        if chosen.named
    }
    return make_plan(
        plan.config,
        named,
        system=plan.system,
        installed=installed,
        fallback="allow",  # the plan that is replaced has announced its fallbacks
        phases=tuple(plan.phases),
        build_refusals=refused,
    )
