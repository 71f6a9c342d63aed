"""SGLang's attention backend that is ours: plans when the model is loaded, translates batches, hands on every call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from attn_core.engines.facts import system_of
from attn_core.engines.sglang.batches import Steps, mode_of
from attn_core.engines.sglang.pools import PoolView, views_of
from attn_core.engines.sglang.registration import backend_name
from attn_core.engines.sglang.served import (
    ServedLayer,
    config_of,
    layers_of,
    phases_of,
    speculation_of,
)
from attn_core.engines.sglang.settings import check_served, deterministic, graphs_of_decode, speculative_settings
from attn_core.engines.sglang.tables import PageTables
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.plan import Plan, plan
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.graph_batch import StaticBatch
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter

_logger = logging.getLogger("sglang.attn")


@dataclass(slots=True)
class Group:
    """The layers of one KV pool: the planned backends over it, and how their batches are made."""

    router: PhaseRouter
    steps: Steps
    buffers: dict[ForwardMode, StaticBatch] = field(default_factory=dict)
    captured: dict[tuple[ForwardMode, int], ForwardBatch] = field(default_factory=dict)


class SGLangBackend(AttentionBackend):  # type: ignore[misc]
    """One for each model runner, like SGLang's own; layers of sliding-window pools are a group beside the others.

    SGLang's preparation outside of a graph is our capture or replay function, depending on ``in_capture``; inside the
    graph nothing is left to do. Whether its keys are written before or during attention is the backend's business.
    """

    #: our batches carry the lengths on the host where SGLang has them; a backend may need them
    needs_cpu_seq_lens = True

    def __init__(self, backend: str, runner: Any) -> None:
        """Raises ConfigError for a model, a pool or an option that is not translated, and what ``plan`` raises."""
        super().__init__()
        check_served(runner)
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.max_context_len = runner.model_config.context_len
        self.forward_metadata: list[ForwardBatch] | None = None
        self._device = torch.device(runner.device)
        self._page_size = int(runner.page_size)
        self._served = layers_of(runner.model, latent=runner.use_mla_backend)
        spec, verify_with = speculative_settings()
        self._speculation = speculation_of(spec)
        self._phases = phases_of(runner, backend, self._speculation, verify_with)
        self._graphs = graphs_of_decode(runner)
        self._mask = self._verify_mask(runner)
        self._groups: list[Group] = []
        self._of_layer: dict[int, tuple[int, AttentionLayer]] = {}
        for view in views_of(runner.token_to_kv_pool, self._served, self._page_size):
            self._add(view, runner, backend)
        self._max_batch_size = 0
        if runner.use_mla_backend:
            _absorb_under(backend_name(backend))

    def _add(self, view: PoolView, runner: Any, backend: str) -> None:
        speculation = self._speculation if "verify" in self._phases else None
        layers = [self._served[i] for i in view.layer_ids]
        config = config_of(
            runner,
            [layer.kind for layer in layers],
            layout=view.kv_cache.layout,
            page_size=self._page_size,
            cuda_graph=self._graphs,
            deterministic=deterministic(),
            speculation=speculation,
        )
        made = plan(config, backend, system=system_of(self._device.type), phases=self._phases)
        router = build(made, view.kv_cache)
        announce(router.plan, view.window_pool)
        tables = PageTables(
            runner.req_to_token_pool.req_to_token,
            self._page_size,
            runner.token_to_kv_pool if view.window_pool else None,
        )
        steps = Steps(
            tables,
            max_context_len=int(config.max_context_len or 0),
            num_draft_tokens=0 if speculation is None else speculation.tokens,
            tree=speculation is not None and speculation.tree,
            verify_buffer=None if self._mask is None else self._mask.buffer,
        )
        index = len(self._groups)
        self._groups.append(Group(router, steps))
        for layer in layers:
            self._of_layer[layer.kind.layer_ids[0]] = index, _layer(layer, None)

    def _verify_mask(self, runner: Any) -> Any:
        """What the draft stage writes its tree into: [B, q, q], as our batches have it."""
        if self._speculation is None or "verify" not in self._phases:
            return None
        from sglang.srt.layers.attention.verify_mask import VerifyMask
        from sglang.srt.speculative.eagle_utils import TreeMaskMode

        count, q = runner.req_to_token_pool.size, self._speculation.tokens
        buffer = torch.zeros(count * q * q, dtype=torch.bool, device=self._device)
        return VerifyMask(buffer=buffer, mode=TreeMaskMode.QLEN_ONLY, max_bs=count, is_read=self._speculation.tree)

    @property
    def verify_mask(self) -> Any:
        return self._mask

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """The draft stage has filled the mask: what was prepared from it is prepared again."""
        if self._speculation is None or not self._speculation.tree or self.forward_metadata is None:
            return
        for group, batch in zip(self._groups, self.forward_metadata, strict=True):
            q = self._speculation.tokens
            assert batch.tree is not None
            batch.tree.visible.copy_(self._mask.buffer[: batch.batch_size * q * q].view(-1, q, q))
            if cuda_graph_bs is None:
                group.router.init_forward_metadata(batch)
            else:
                group.router.init_forward_metadata_replay_cuda_graph(batch)

    # -- preparing a step

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare an eager step, once for all layers."""
        self.forward_metadata = []
        for group in self._groups:
            batch = group.steps.eager(forward_batch)
            group.router.init_forward_metadata(batch)
            self.forward_metadata.append(batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self._max_batch_size = max_bs
        for group in self._groups:
            group.router.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return max(group.router.cuda_graph_seq_len_fill_value for group in self._groups)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed: our capture or replay function over buffers that stay.

        Raises BatchError for graphs of prefill, which the contract does not have.
        """
        mode = mode_of(forward_batch)
        if mode not in (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY):
            raise BatchError(
                f"a graph of {mode.name}", accepted="DECODE, TARGET_VERIFY",
                hint="--cuda-graph-backend-prefill disabled, or breakable",
            )  # fmt: skip
        self.forward_metadata = [self._graph_batch(group, mode, forward_batch.batch_size) for group in self._groups]
        for group, batch in zip(self._groups, self.forward_metadata, strict=True):
            group.steps.fill(batch, forward_batch, in_capture=in_capture)
            if in_capture:
                group.router.init_forward_metadata_capture_cuda_graph(batch)
            else:
                group.router.init_forward_metadata_replay_cuda_graph(batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Nothing: what a replay needs is in buffers before it starts."""

    def _graph_batch(self, group: Group, mode: ForwardMode, size: int) -> ForwardBatch:
        """The buffers of this size, made when it is captured; a replay finds the one of its capture."""
        if (mode, size) not in group.captured:
            if mode not in group.buffers:
                group.buffers[mode] = group.steps.buffers(
                    mode, self._max_batch_size, fill_value=self.get_cuda_graph_seq_len_fill_value(), device=self._device
                )
            group.captured[mode, size] = group.buffers[mode].of_size(size)
        return group.captured[mode, size]

    # -- attention

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Tensor:
        return self._attend(q, k, v, layer, save_kv_cache, more)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Tensor:
        return self._attend(q, k, v, layer, save_kv_cache, more)

    def _attend(self, q: Tensor, k: Any, v: Any, module: Any, save_kv_cache: bool, more: dict[str, Any]) -> Tensor:
        """q [T, Hq * D] -> [T, Hq * Dv]. Raises ConfigError for arguments whose meaning is not known."""
        sinks = more.pop("sinks", None) if more else None
        if more and (unknown := sorted(n for n, value in more.items() if value is not None and value is not False)):
            raise ConfigError(
                f"layer {module.layer_id} asks for attention with {unknown}", accepted="sinks",
                hint="choose one of SGLang's own attention backends for this model",
            )  # fmt: skip
        index, planned = self._layer_of(module, sinks)
        pool = self.token_to_kv_pool
        if pool.layer_transfer_counter is not None:
            pool.get_key_buffer(module.layer_id)  # waits until this layer's keys have been loaded
        assert self.forward_metadata is not None, "init_forward_metadata comes before attention"
        router, batch = self._groups[index].router, self.forward_metadata[index]
        q = q.reshape(-1, planned.num_q_heads, planned.qk_head_dim).contiguous()
        save_kv_cache = save_kv_cache and k is not None  # without keys they are there already
        if k is not None:
            k = k.reshape(-1, planned.num_kv_heads, planned.qk_head_dim).contiguous()
        latent = planned.kind == "mla" or v is None
        v = None if latent else v.reshape(-1, planned.num_kv_heads, planned.v_head_dim).contiguous()
        out = router.forward(q, k, v, planned, batch, save_kv_cache=save_kv_cache)
        assert isinstance(out, Tensor)
        return out.view(out.shape[0], -1)

    def _layer_of(self, module: Any, sinks: Tensor | None) -> tuple[int, AttentionLayer]:
        """The pool's group and the planned layer of ``module``. Raises ConfigError for one that was not planned."""
        served = self._served.get(module.layer_id)
        if served is None or served.module is not module:
            raise ConfigError(f"a module of layer {module.layer_id} that was not there when attention was planned")
        index, planned = self._of_layer[module.layer_id]
        scales = module.k_scale_float or 1.0, module.v_scale_float or 1.0
        if planned.sinks is not sinks or (planned.k_scale, planned.v_scale) != scales:
            planned = _layer(served, sinks)
            self._of_layer[module.layer_id] = index, planned
        return index, planned

    def support_triton(self) -> bool:
        """Whether SGLang may prepare batches with its Triton kernels, which are for GPUs."""
        return self._device.type != "cpu"


def _layer(served: ServedLayer, sinks: Tensor | None) -> AttentionLayer:
    kind, module = served.kind, served.module
    return AttentionLayer(
        layer_id=module.layer_id,
        num_q_heads=kind.num_q_heads,
        num_kv_heads=kind.num_kv_heads,
        qk_head_dim=kind.qk_head_dim,
        v_head_dim=kind.v_head_dim,
        scale=kind.softmax_scale,
        kind=kind.kind,
        sliding_window=kind.sliding_window,
        softcap=kind.softcap,
        sinks=sinks,
        k_scale=module.k_scale_float or 1.0,
        v_scale=module.v_scale_float or 1.0,
    )


def announce(made: Plan, window_pool: bool) -> None:
    """One line for each phase that was planned, once."""
    for phase, chosen in made.phases.items():
        native = f", page table rewritten to pages of {chosen.native_page_size}" if chosen.converted else ""
        pool = " (sliding-window pool)" if window_pool else ""
        _logger.info("attn: %s%s by %s (%s)%s", phase, pool, chosen.backend.listed, chosen.why, native)


def _absorb_under(name: str) -> None:
    """DeepSeek's layers choose their maths by the backend's name; under ours they absorb, in every mode."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    absorb: Callable[[Any, Any], Any] = handlers._dispatch_mla_subtype
    handlers.AttentionBackendRegistry.register(name, absorb)
