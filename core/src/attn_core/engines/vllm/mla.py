"""AttnMLABackend: MLA layers over the latent cache in every phase, with absorbed queries, as the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import MLAAttentionImpl

from attn_core.engines.vllm.backend import AttnBackend, AttnMetadataBuilder
from attn_core.engines.vllm.group import Step
from attn_core.engines.vllm.layers import refuse_extras
from attn_core.engines.vllm.served import serve
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import LayerKind
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter


@dataclass(slots=True, eq=False)
class MLAStep:
    """A step in the fields that vLLM's MLA layer reads: every token is a "decode", whose queries vLLM absorbs."""

    step: Step
    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int = 0
    prefill: None = None

    @property
    def decode(self) -> Step:
        return self.step


class AttnMLAMetadataBuilder(AttnMetadataBuilder):
    """Steps of MLA layers."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        return _all_absorbed(self.group.step(common_attn_metadata))

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        return _all_absorbed(self.group.captured_step(common_attn_metadata))


def _all_absorbed(step: Step) -> MLAStep:
    return MLAStep(step, step.num_tokens, step.batch.batch_size, step.num_tokens)


class AttnMLABackend(AttnBackend):
    """What CUSTOM is in a model with MLA. vLLM projects queries and outputs, the plan's backends attend."""

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return AttnMLAImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return AttnMLAMetadataBuilder


class LatentLayer:
    """One MLA layer to the backends: its kind, its writes, its absorbed queries."""

    num_heads: int
    head_size: int
    kv_lora_rank: int
    scale: float
    sliding_window: int | None
    _bound: tuple[PhaseRouter, AttentionLayer] | None = None

    def kind_of(self, layer: Any) -> LayerKind:
        """What the layer needs of the latent cache: one KV head as wide as the latent and its rotated part."""
        return LayerKind(
            self.num_heads, 1, self.head_size, self.kv_lora_rank, kind="mla", scale=self.scale,
            sliding_window=self.sliding_window,
        )  # fmt: skip

    def bind(self, router: PhaseRouter, layer: AttentionLayer) -> None:
        """From now on this is ``layer`` to the backends of ``router``."""
        self._bound = router, layer

    def write(self, kv_c_normed: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
        """Latents [T, R] and their rotated parts [T, 1, P] into the cache at ``slot_mapping``; -1 is not written."""
        if self._bound is None:
            if bool((slot_mapping >= 0).any()):
                raise BatchError("vLLM writes latents before it has built a step")
            return  # it warms up over slots of -1
        router, layer = self._bound
        count = min(kv_c_normed.shape[0], slot_mapping.shape[0])
        latent = torch.cat((kv_c_normed[:count, None], k_pe[:count].view(count, 1, -1)), dim=-1)
        router.write_kv(latent, None, layer, slot_mapping[:count].long())

    def attend(self, q: Tensor | tuple[Tensor, Tensor], step: Step) -> Tensor:
        """Absorbed queries [T, Hq, R + P], whole or in two parts -> [T, Hq, R], over keys that are written."""
        assert self._bound is not None
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        out = step.backend.forward(query, None, None, self._bound[1], step.batch, save_kv_cache=False)
        assert isinstance(out, Tensor)
        return out


class AttnMLAImpl(LatentLayer, MLAAttentionImpl[MLAStep]):  # type: ignore[misc]
    """One MLA layer of the model, every phase of it over the latent."""

    supports_quant_query_input = False
    supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        *,
        kv_lora_rank: int,
        indexer: object | None = None,
        q_pad_num_heads: int | None = None,
        **dimensions: Any,
    ) -> None:
        from vllm.config import get_current_vllm_config

        serve(get_current_vllm_config())
        refuse_extras({"alibi_slopes": alibi_slopes, "indexer": indexer, "soft cap": logits_soft_cap})
        if kv_sharing_target_layer_name is not None:
            raise ConfigError("an MLA layer that reads another's cache", given=kv_sharing_target_layer_name)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_lora_rank = num_kv_heads, kv_lora_rank
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.q_pad_num_heads = None

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        self.write(kv_c_normed, k_pe, slot_mapping)

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: MLAStep, layer: Any
    ) -> tuple[Tensor, None]:
        return self.attend(q, attn_metadata.step), None
