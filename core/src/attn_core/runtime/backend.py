"""AttentionBackend: the protocol, version 1.0, that every backend speaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer

if TYPE_CHECKING:
    from torch import Tensor

    from attn_core.planning.reasons import Reason


class AttentionBackend(ABC):
    """Two forward functions and one metadata function make a backend that works; three more make it replay graphs.

    One instance serves one cache and one config. Per step the engine calls ``init_forward_metadata`` once, then one
    forward for each layer. Everything that belongs to a step lives in ``batch.plan_state``, so several batches may be
    in flight. Keys and values are always read from the cache: a forward first writes k, v to ``batch.slot_mapping``;
    with ``save_kv_cache=False`` they are there already (``write_kv``), and k and v may be None.

    Shapes: q [T, Hq, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv] -> out [T, Hq, Dv] (, lse [T, Hq] fp32). MLA: k [T, 1, Dqk],
    v None. A cross layer's k and v are the encoder's [T_enc, Hkv, D], written to ``batch.encoder_slot_mapping``, or
    None when they were written in an earlier step. ``out`` is filled and returned if given.
    """

    #: the name of the backend's entry point
    name: ClassVar[str] = ""
    #: what an engine puts in seq_lens for the padded requests of a captured graph: 0 or 1
    cuda_graph_seq_len_fill_value: ClassVar[int] = 0

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        self.config = config
        self.kv_cache = kv_cache

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        """Why the *installed build* of the kernel library cannot do this, beyond the manifest; empty if it can."""
        return ()

    def warmup(self, config: AttentionConfig) -> None:  # noqa: B027 - most backends have nothing to compile
        """Compile or load whatever ``config`` will need, so that no step waits for it."""

    @abstractmethod
    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Prepare one step, once for all its layers, into ``batch.plan_state``."""

    @abstractmethod
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
        """Any number of new tokens a request: prefill with or without a prefix, mixed batches, verify, draft extend."""

    @abstractmethod
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
        """One new token a request."""

    @final
    def forward(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The forward that ``batch.mode`` asks for. IDLE gives outputs of no rows."""
        if batch.mode is ForwardMode.DECODE:
            return self.forward_decode(q, k, v, layer, batch, **options)
        if batch.mode is not ForwardMode.IDLE:
            return self.forward_extend(q, k, v, layer, batch, **options)
        if q.shape[0]:
            raise BatchError(f"IDLE with {q.shape[0]} tokens", accepted="no token")
        empty = q.new_empty(0, layer.num_q_heads, layer.v_head_dim)
        return (empty, q.new_empty(0, layer.num_q_heads).float()) if options.get("return_lse") else empty

    def forward_ragged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: AttentionLayer,
        *,
        query_start_loc: Tensor,
        key_start_loc: Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Feature ``ragged``: attention over keys that are given, q [T, Hq, Dqk], k [S, Hkv, Dqk], v [S, Hkv, Dv].

        Request b has queries ``query_start_loc[b]:query_start_loc[b + 1]`` and keys likewise. ``causal`` aligns the
        last query with the last key. Needs no batch and no cache.
        """
        raise ConfigError(
            f"{self.name or type(self).__name__} has no forward_ragged",
            hint="plan with ragged layers: it is refused there",
        )

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        """Store k, v in the cache, for engines that write before they attend. -1 is not written."""
        self.kv_cache.write(layer, slot_mapping, k, v)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        """Feature ``cuda_graph``: make every buffer that graphs share, once. Bounds are of one step."""
        raise ConfigError(
            f"{self.name or type(self).__name__} has no CUDA graphs",
            hint="plan with cuda_graph=True: it is refused there",
        )

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        """Like ``init_forward_metadata``, into the shared buffers; called before a graph of this size is captured."""
        raise ConfigError(
            f"{self.name or type(self).__name__} has no CUDA graphs",
            hint="plan with cuda_graph=True: it is refused there",
        )

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        """Refresh the shared buffers before a replay. Critical path: no host synchronisation, no allocation."""
        raise ConfigError(
            f"{self.name or type(self).__name__} has no CUDA graphs",
            hint="plan with cuda_graph=True: it is refused there",
        )
