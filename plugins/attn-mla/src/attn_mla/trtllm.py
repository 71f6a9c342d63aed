"""The backend `trtllm_mla`: TensorRT-LLM's MLA decode kernels for Blackwell, as FlashInfer ships them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from attn_core.errors import PluginLoadError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_mla.latent_decode import LatentDecodeBackend
from attn_mla.latent_step import LatentStep
from attn_mla.library_errors import raised
from attn_mla.queries import quantize

#: Width of a query head before absorption, without its rotary part: DeepSeek's, the only one with 512 + 64.
QK_NOPE_HEAD_DIM: Final = 128
WORKSPACE_BYTES: Final = 128 << 20
#: Numbers of heads between these the kernels do not have; heads of zeros are added up to the second.
HEADS_WITHOUT_KERNEL: Final = (64, 128)


@cache
def load() -> Any:
    """``flashinfer.mla.trtllm_batch_decode_with_kv_cache_mla``. Raises PluginLoadError if it cannot be imported."""
    try:
        return import_module("flashinfer.mla").trtllm_batch_decode_with_kv_cache_mla
    except (ImportError, OSError, AttributeError) as error:
        raise PluginLoadError(
            f"flashinfer cannot be imported: {error}", hint="pip install flashinfer-python"
        ) from error


@cache
def workspace(device: torch.device) -> Tensor:
    """One zeroed workspace a device, [134217728] uint8: the kernels keep counters in it, which they leave at zero."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class TRTLLMMLABackend(LatentDecodeBackend):
    """TensorRT-LLM MLA decode and chain verify over pages of 32 or 64."""

    name = "trtllm_mla"

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._decode = load()
        self._workspace = workspace(kv_cache.device)

    def attend(
        self, q: Tensor, layer: AttentionLayer, step: LatentStep, return_lse: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, query_len, heads, width = q.shape
        few, many = HEADS_WITHOUT_KERNEL
        added = many - heads if few < heads < many else 0
        if added:
            q, out = torch.nn.functional.pad(q, (0, 0, 0, added)), None
        shape = (batch, query_len, heads + added, layer.v_head_dim)
        target = q.new_empty(shape) if out is None else out.view(shape)
        lse = q.new_empty(batch * query_len, heads + added, dtype=torch.float32) if return_lse else None
        scores: float | Tensor = layer.scale
        values: float | Tensor = 1.0
        if self._fp8:
            rows, scores = quantize(q.flatten(0, 1), step.page_table, layer.scale * layer.k_scale)
            q, values = rows.view(q.shape), self._on_device(layer.k_scale)
        try:
            found = self._decode(
                query=q,
                kv_cache=self.kv_cache.k(layer.layer_id),
                workspace_buffer=self._workspace,
                qk_nope_head_dim=QK_NOPE_HEAD_DIM,
                kv_lora_rank=layer.v_head_dim,
                qk_rope_head_dim=width - layer.v_head_dim,
                block_tables=step.page_table,
                seq_lens=step.seq_lens,
                max_seq_len=step.max_seq_len,
                out=target,
                bmm1_scale=scores,
                bmm2_scale=values,
                backend="trtllm-gen",
                lse=lse,
                return_lse=return_lse,
                return_lse_base="basee",
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise raised(error, "TRT-LLM MLA", layer, "the kernels are for sm_100 alone") from error
        target = found[0] if return_lse else found
        if added:
            target, lse = target[:, :, :heads], None if lse is None else lse[:, :heads]
        return target, lse
