"""AttnMLAExpanded: MLA with prefill in vLLM's own prefill registry; decodes are the plan's, over the latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
)
from vllm.v1.attention.backend import AttentionCGSupport

from attn_core.engines.vllm.backend import AttnMetadataBuilder
from attn_core.engines.vllm.group import CacheGroup, Step
from attn_core.engines.vllm.layers import refuse_extras
from attn_core.engines.vllm.mla import AttnMLABackend, LatentLayer
from attn_core.engines.vllm.served import serve, served_now


class AttnMLAExpandedBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):  # type: ignore[misc]
    """vLLM's own metadata, with a Step of ours for the decodes of each step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._names = layer_names
        self._group: CacheGroup | None = None
        self._capturing = False
        self._common: Any = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """One token a request where the plan has CUDA graphs: longer steps go to vLLM's prefill."""
        support = AttnMetadataBuilder.get_cudagraph_support(vllm_config, kv_cache_spec)
        one = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return support if support is AttentionCGSupport.NEVER else one

    def _ready(self) -> CacheGroup:
        """The backends over the cache that vLLM has now; a step without decodes needs them to write."""
        if self._group is None or not self._group.stands:
            self._group = CacheGroup(served_now(), self._names, block_size=self.kv_cache_spec.block_size)
        return self._group

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        self._common = common_attn_metadata
        self._ready()
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._capturing = False

    def _build_decode(self, *, num_decode_tokens: int, **fields: Any) -> Step:
        """The leading decodes of the step as a step of their own."""
        common = self._common
        requests = fields["seq_lens_device"].shape[0]
        decodes = common if requests == common.num_reqs else common.unpadded(num_decode_tokens, requests)
        group = self._ready()
        return group.captured_step(decodes) if self._capturing else group.step(decodes)


class AttnMLAExpanded(AttnMLABackend):
    """What CUSTOM is in a model with MLA where ``mla_prefill_backend`` names who expands and attends in prefill."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return AttnMLAExpandedImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return AttnMLAExpandedBuilder


class AttnMLAExpandedImpl(LatentLayer, MLACommonImpl[MLACommonMetadata]):  # type: ignore[misc]
    """One MLA layer: vLLM's prefill, our decode."""

    supports_pcp = False

    def __init__(self, *args: Any, **options: Any) -> None:
        from vllm.config import get_current_vllm_config

        serve(get_current_vllm_config())
        refuse_extras({"indexer": options.get("indexer"), "soft cap": options.get("logits_soft_cap")})
        super().__init__(*args, **options)
        self.sliding_window = options.get("sliding_window")
        self.supports_quant_query_input = False

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
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, None]:
        return self.attend(q, attn_metadata.decode), None
