"""The model that a process of vLLM serves: its attention layers, the plan for them, and what vLLM asks of it.

vLLM asks a backend's *class* for block sizes, layouts and graphs, without saying for which model: so the process keeps
the model whose layers were made last.
"""

from __future__ import annotations

from typing import Any

from attn_core.engines.vllm import planning
from attn_core.engines.vllm.layers import kinds_of, only
from attn_core.engines.vllm.planning import Blocks
from attn_core.engines.vllm.selection import asked_backend
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import LayerKind
from attn_core.planning.plan import Plan
from attn_core.runtime.build import settle

_served: Served | None = None


class Served:
    """One engine's model in this process. Its layers are those of vLLM's ``static_forward_context`` that are ours."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.backend = asked_backend(vllm_config.additional_config)
        self.context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._planned: tuple[tuple[str, ...], Plan, Blocks] | None = None

    @property
    def layers(self) -> dict[str, Any]:
        """Our attention layers by vLLM's name; the place of each is its layer id."""
        return {name: layer for name, layer in self.context.items() if hasattr(getattr(layer, "impl", None), "kind_of")}

    @property
    def plan(self) -> Plan:
        """The plan for all layers, settled and announced; made again if vLLM has added layers (a draft model's)."""
        return self._made()[1]

    @property
    def blocks(self) -> Blocks:
        """The caches that the plan can use."""
        return self._made()[2]

    def _made(self) -> tuple[tuple[str, ...], Plan, Blocks]:
        layers = self.layers
        if not layers:
            raise ConfigError("vLLM asks for a plan before any attention layer was made")
        names = tuple(layers)
        if self._planned is None or self._planned[0] != names:
            dtypes = dict.fromkeys(layer.kv_cache_dtype for layer in layers.values())
            if len(dtypes) > 1:
                raise ConfigError(f"layers with caches of {', '.join(dtypes)}", accepted="one kv_cache_dtype for all")
            config = planning.serving_config(self.vllm_config, kinds_of(layers.values()), next(iter(dtypes)))
            phases = planning.phases_of(self.vllm_config)
            plan = settle(planning.make_plan(config, self.backend, phases, planning.system_here()))
            _announce(planning.summary(plan))
            self._planned = names, plan, planning.blocks_of(plan)
        return self._planned

    def group(self, names: list[str], *, page_size: int, layout: str) -> Plan:
        """The plan for the layers ``names``, which share a cache of this page size and layout."""
        whole = self.plan
        return planning.group_plan(whole, self.kinds(names), page_size=page_size, layout=layout)

    def kinds(self, names: list[str]) -> tuple[LayerKind, ...]:
        """The layer kinds of the layers ``names``, with the ids of the whole model."""
        return only(self.plan.config.layers, frozenset(self.layer_id(name) for name in names))

    def layer_id(self, name: str) -> int:
        """The id that the layer has in the plan."""
        return list(self.layers).index(name)


def serve(vllm_config: Any) -> Served:
    """The model whose layers are being made with ``vllm_config``; it is what the process serves from now on."""
    global _served
    context = vllm_config.compilation_config.static_forward_context
    if _served is None or _served.context is not context:
        _served = Served(vllm_config)
    return _served


def served() -> Served | None:
    """The model that this process serves, None before its first layer is made."""
    return _served


def served_now() -> Served:
    """The model that this process serves. Raises BatchError if there is none."""
    if _served is None:
        raise BatchError("vLLM calls attn's backend, and no layer of it was made in this process")
    return _served


def _announce(text: str) -> None:
    from vllm.distributed.parallel_state import is_global_first_rank
    from vllm.logger import init_logger

    if is_global_first_rank():
        init_logger("vllm.attn").info("%s", text)
