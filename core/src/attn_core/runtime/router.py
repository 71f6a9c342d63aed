"""PhaseRouter: one backend for each phase behind the protocol of one backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor

from attn_core.errors import BatchError, ConfigError, RequestTooLongError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.plan import Plan
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import PHASE_OF_MODE, ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import FP8_DTYPES, TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer

#: The model that a step serves: the target, or the draft model of speculative decoding, whose decodes are `draft`.
Role = Literal["target", "draft"]

#: What a layer must have in common with the kind it was planned as.
_PLANNED: Final = (
    "num_q_heads",
    "num_kv_heads",
    "qk_head_dim",
    "v_head_dim",
    "kind",
    "cross",
    "sliding_window",
    "softcap",
)


@dataclass(slots=True)
class SplitState:
    """What a MIXED batch is whose decodes and prompts run on different backends."""

    decode: ForwardBatch
    extend: ForwardBatch


class PhaseRouter(AttentionBackend):
    """Sends every batch to the backend that was planned for its phase, and refuses what was not planned.

    A layer is compared with the plan when it is first seen, a batch when its step begins; the way of a call is two
    dict lookups. ``role="draft"``: DECODE belongs to the phase `draft`.
    """

    def __init__(
        self, plan: Plan, backends: Mapping[Phase, AttentionBackend], kv_cache: KVCache, *, role: Role = "target"
    ) -> None:
        super().__init__(plan.config, kv_cache)
        self.plan = plan
        self.role = role
        self.backends: Mapping[Phase, AttentionBackend] = dict(backends)
        self._by_mode: dict[ForwardMode, AttentionBackend] = {
            mode: backends[phase]
            for mode in PHASE_OF_MODE
            if mode is not ForwardMode.MIXED and (phase := phase_of(mode, role)) in backends
        }
        decode, extend = self._by_mode.get(ForwardMode.DECODE), self._by_mode.get(ForwardMode.EXTEND)
        self._splits = decode is not extend
        if decode is extend and extend is not None:
            self._by_mode[ForwardMode.MIXED] = extend
        self._seen: dict[int, AttentionLayer] = {}
        self._seen_ragged: dict[int, AttentionLayer] = {}
        self.cuda_graph_seq_len_fill_value = max(  # type: ignore[misc]
            (backend.cuda_graph_seq_len_fill_value for backend in self._graphed()), default=0
        )

    @property
    def distinct(self) -> tuple[AttentionBackend, ...]:
        """The backends, each once."""
        return tuple({id(backend): backend for backend in self.backends.values()}.values())

    def backend_of(self, mode: ForwardMode) -> AttentionBackend:
        """What runs batches of ``mode``. Raises BatchError if their phase was not planned."""
        backend = self._by_mode.get(mode)
        if backend is None:
            raise BatchError(
                f"a {mode.name} batch, and nothing is planned for {phase_of(mode, self.role)}",
                given=mode.name,
                accepted=[known.name for known in self._by_mode],
                hint="plan this phase too (speculative_num_draft_tokens for verify and draft)",
            )
        return backend

    def warmup(self, config: AttentionConfig) -> None:
        for backend in self.distinct:
            backend.warmup(config)

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        if batch.mode is ForwardMode.IDLE:
            batch.plan_state = None
            return
        self._check_batch(batch)
        if batch.mode is not ForwardMode.MIXED or not self._splits:
            self.backend_of(batch.mode).init_forward_metadata(batch)
            return
        decode, extend = batch.split()
        state = SplitState(decode, extend)
        for part in (decode, extend):
            if part.batch_size:
                self.backend_of(part.mode).init_forward_metadata(part)
        batch.plan_state = state

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self._seen.get(layer.layer_id) is not layer:
            self._admit(layer, q, ragged=False)
        if return_lse and not self.config.lse:
            raise _unplanned_lse()
        if batch.mode is ForwardMode.MIXED and self._splits:
            return self._forward_split(q, k, v, layer, batch, save_kv_cache, return_lse, out)
        return self._by_mode[batch.mode].forward_extend(
            q, k, v, layer, batch, save_kv_cache=save_kv_cache, return_lse=return_lse, out=out
        )

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self._seen.get(layer.layer_id) is not layer:
            self._admit(layer, q, ragged=False)
        if return_lse and not self.config.lse:
            raise _unplanned_lse()
        return self._by_mode[batch.mode].forward_decode(
            q, k, v, layer, batch, save_kv_cache=save_kv_cache, return_lse=return_lse, out=out
        )

    def forward_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, *, return_lse: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self._seen_ragged.get(layer.layer_id) is not layer:
            self._admit(layer, q, ragged=True)
        if return_lse and not self.config.lse:
            raise _unplanned_lse()
        return self.backend_of(ForwardMode.EXTEND).forward_ragged(q, k, v, layer, return_lse=return_lse, **options)

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        next(iter(self.backends.values())).write_kv(k, v, layer, slot_mapping)

    def _forward_split(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        save_kv_cache: bool,
        return_lse: bool,
        out: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Decodes and prompts on their own backends, into one output."""
        state: SplitState = batch.plan_state
        if layer.cross and k is not None:  # the encoder's keys, which are not cut like the tokens
            if save_kv_cache and batch.encoder_slot_mapping is not None:
                self.write_kv(k, v, layer, batch.encoder_slot_mapping)
                save_kv_cache = False
            k = v = None
        if out is None:
            out = q.new_empty(q.shape[0], layer.num_q_heads, layer.v_head_dim)
        lse = q.new_empty(q.shape[0], layer.num_q_heads).float() if return_lse else None
        first = 0
        for part in (state.decode, state.extend):
            rows = slice(first, first + part.num_tokens)
            first = rows.stop
            if not part.batch_size:
                continue
            result = self._by_mode[part.mode].forward(
                q[rows],
                None if k is None else k[rows],
                None if v is None else v[rows],
                layer,
                part,
                save_kv_cache=save_kv_cache,
                return_lse=return_lse,
                out=out[rows],
            )
            if lse is not None:
                lse[rows] = result[1]
        return out if lse is None else (out, lse)

    def _check_batch(self, batch: ForwardBatch) -> None:
        """Raise for a step that asks for more than was planned; looks at host values only."""
        config = self.config
        if config.max_context_len is not None and batch.max_seq_len > config.max_context_len:
            raise RequestTooLongError(
                f"a sequence of {batch.max_seq_len} tokens", given=batch.max_seq_len,
                accepted=f"at most max_context_len, {config.max_context_len}",
            )  # fmt: skip
        if batch.tree is not None and config.speculative_eagle_topk == 1:
            raise BatchError(
                "a tree of draft tokens, where chains are planned",
                accepted="tree=None, or speculative_eagle_topk above 1",
            )
        if batch.spans is not None and PHASE_OF_MODE[batch.mode] == "prefill" and not config.bidirectional_spans:
            raise BatchError(
                "bidirectional spans, where none are planned", accepted="spans=None, or bidirectional_spans=True"
            )
        if batch.mode is ForwardMode.TARGET_VERIFY and batch.max_query_len > config.speculative_num_draft_tokens:
            raise BatchError(
                f"{batch.max_query_len} draft tokens a request", given=batch.max_query_len,
                accepted=f"at most speculative_num_draft_tokens, {config.speculative_num_draft_tokens}",
            )  # fmt: skip

    def _admit(self, layer: AttentionLayer, q: Tensor, *, ragged: bool) -> None:
        """Remember ``layer``, if it and its queries are what was planned. Raises ConfigError."""
        kind = self.config.kind_of(layer.layer_id)
        wrong = list(_departures(layer, kind))
        if ragged != kind.ragged:
            wrong.append(f"called {'with given keys' if ragged else 'over the cache'}, planned as ragged={kind.ragged}")
        if q.dtype is not TORCH_DTYPES[self.config.dtype]:
            wrong.append(f"queries of {q.dtype}, planned as {self.config.dtype}")
        if tuple(q.shape[1:]) != (kind.num_q_heads, kind.qk_head_dim):
            wrong.append(f"queries {list(q.shape)}, planned as [tokens, {kind.num_q_heads}, {kind.qk_head_dim}]")
        if not ragged and (layer.k_scale, layer.v_scale) != (1.0, 1.0) and self.kv_cache.dtype not in FP8_DTYPES:
            wrong.append(f"scales {layer.k_scale}, {layer.v_scale} with a cache of {self.kv_cache.dtype}")
        if wrong:
            raise ConfigError(
                f"layer {layer.layer_id} is not what was planned: {'; '.join(wrong)}",
                given=layer.layer_id,
                hint="plan with the layer kinds that the model has",
            )
        (self._seen_ragged if ragged else self._seen)[layer.layer_id] = layer

    # -- graphs

    def _graphed(self) -> tuple[AttentionBackend, ...]:
        """What runs the phases that graphs are captured of, each once."""
        found = [backend for phase, backend in self.backends.items() if phase != "prefill"]
        return tuple({id(backend): backend for backend in found}.values())

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        if not self.config.cuda_graph:
            raise ConfigError("graphs were not planned", hint="plan with cuda_graph=True")
        for backend in self._graphed():
            backend.init_cuda_graph_state(max_batch_size, max_num_tokens)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        self._check_graph(batch)
        self.backend_of(batch.mode).init_forward_metadata_capture_cuda_graph(batch)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self._check_graph(batch)
        self.backend_of(batch.mode).init_forward_metadata_replay_cuda_graph(batch)

    def _check_graph(self, batch: ForwardBatch) -> None:
        self._check_batch(batch)
        if phase_of(batch.mode, self.role) == "prefill":
            raise BatchError(f"a graph of {batch.mode.name}", accepted="DECODE, TARGET_VERIFY, DRAFT_EXTEND")


def phase_of(mode: ForwardMode, role: Role) -> Phase:
    """The phase that a batch of ``mode`` belongs to, in the target model or in the draft model."""
    if mode is ForwardMode.DECODE and role == "draft":
        return "draft"
    return PHASE_OF_MODE[mode]


def _departures(layer: AttentionLayer, kind: LayerKind) -> list[str]:
    """What of ``layer`` is not as its kind says."""
    wrong = [
        f"{name} {getattr(layer, name)}, planned as {getattr(kind, name)}"
        for name in _PLANNED
        if getattr(layer, name) != getattr(kind, name)
    ]
    if (layer.sinks is not None) != kind.sinks:
        wrong.append(f"sinks {'given' if layer.sinks is not None else 'missing'}, planned as sinks={kind.sinks}")
    if not math.isclose(layer.scale, kind.softmax_scale, rel_tol=1e-6):
        wrong.append(f"scale {layer.scale}, planned as {kind.softmax_scale}")
    return wrong


def _unplanned_lse() -> ConfigError:
    return ConfigError("return_lse, where no LSE is planned", hint="plan with lse=True")
