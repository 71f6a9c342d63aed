"""What the two decode-only backends share: the step, the cache write, the graphs; each adds its library's one call."""

from __future__ import annotations

from abc import abstractmethod

import torch
from attn_core.errors import BatchError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import FP8_DTYPES, TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_mla.latent_step import LatentGraphBuffers, LatentStep
from attn_mla.queries import quantize


class LatentDecodeBackend(AttentionBackend):
    """Decode and chain verify over the paged latent, for libraries that take one number of new tokens a request."""

    cuda_graph_seq_len_fill_value = 1

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._graphs: LatentGraphBuffers | None = None
        self._fp8 = kv_cache.dtype in FP8_DTYPES
        self._scales: dict[float, Tensor] = {}

    @abstractmethod
    def attend(
        self, q: Tensor, layer: AttentionLayer, step: LatentStep, return_lse: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, query_len, Hq, 576] -> out [B, query_len, Hq, 512] and, if wanted, lse [T, Hq], natural log, fp32."""

    def warmup(self, config: AttentionConfig) -> None:
        """The kernels of the libraries are compiled or loaded by them; ours, for fp8 queries, are compiled here."""
        device = self.kv_cache.device
        if self._fp8 and device.type == "cuda":
            table = torch.ones(1, 1, dtype=torch.int32, device=device)
            for kind in config.cached_kinds:
                dtype = TORCH_DTYPES[config.dtype]
                quantize(torch.zeros(1, kind.num_q_heads, kind.qk_head_dim, dtype=dtype, device=device), table)

    def _on_device(self, scale: float) -> Tensor:
        """[1] fp32 on the device; made by the first step, never while a graph is captured."""
        found = self._scales.get(scale)
        if found is None:
            found = self._scales[scale] = torch.full((1,), scale, dtype=torch.float32, device=self.kv_cache.device)
        return found

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = LatentStep.of(batch, name=self.name)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._graphs = LatentGraphBuffers(self.config, self.kv_cache, max_batch_size)
        self.warmup(self.config)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = LatentStep.of(self._graph_buffers().capture(batch), name=self.name, in_graph=True)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self._graph_buffers().refill(batch)

    def _graph_buffers(self) -> LatentGraphBuffers:
        if self._graphs is None:
            raise BatchError("no graph state", hint="call init_cuda_graph_state first")
        return self._graphs

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
        if save_kv_cache and k is not None:
            self.kv_cache.write(layer, batch.slot_mapping, k, v)
        if not q.shape[0]:
            empty = q.new_empty(0, layer.num_q_heads, layer.v_head_dim)
            return (empty, q.new_empty(0, layer.num_q_heads, dtype=torch.float32)) if return_lse else empty
        step: LatentStep = batch.plan_state
        given = q.unsqueeze(1) if step.query_len == 1 else q.view(-1, step.query_len, *q.shape[1:])
        found, lse = self.attend(given, layer, step, return_lse, out)
        if out is None:
            rows = found.squeeze(1) if step.query_len == 1 else found.flatten(0, 1)
        else:
            rows = out if found.data_ptr() == out.data_ptr() else out.copy_(found.flatten(0, 1))
        return (rows, lse) if lse is not None else rows

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
        """A chain of drafts; `init_forward_metadata` has refused every other mode."""
        return self.forward_decode(q, k, v, layer, batch, save_kv_cache=save_kv_cache, return_lse=return_lse, out=out)
