"""AttnBackend: what vLLM asks of an attention backend, answered from the plan; AttnImpl: one layer of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from attn_core.engines.vllm import planning
from attn_core.engines.vllm.group import CacheGroup, Step
from attn_core.engines.vllm.layers import refuse_extras
from attn_core.engines.vllm.selection import asked_backend
from attn_core.engines.vllm.served import serve, served, served_now
from attn_core.errors import ConfigError
from attn_core.planning.config import LayerKind
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter

#: vLLM's layouts of each of ours; those in which the blocks of all layers lie together are the last choice
_LAYOUTS = {
    "NHD": (KVCacheLayout.LBNHC, KVCacheLayout.BLNHC),
    "HND": (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC),
    "MLA": (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC),
}


class AttnMetadataBuilder(AttentionMetadataBuilder[Step]):  # type: ignore[misc]
    """Builds the steps of the layers that share a cache. vLLM puts a step's decodes first, as MIXED batches have them.

    The cache does not exist yet when vLLM makes a builder: the backends are built with the first step.
    """

    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._group: CacheGroup | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of decodes alone where the plan has CUDA graphs, of verifies too where those are planned."""
        config = served_now().plan.config
        if not config.cuda_graph:
            return AttentionCGSupport.NEVER
        if config.speculative_num_draft_tokens:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @property
    def group(self) -> CacheGroup:
        """The backends over the cache that vLLM has now."""
        if self._group is None or not self._group.stands:
            self._group = CacheGroup(served_now(), self.layer_names, block_size=self.kv_cache_spec.block_size)
        return self._group

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        return self.group.step(common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        return self.group.captured_step(common_attn_metadata)


class AttnBackend(AttentionBackend):  # type: ignore[misc]
    """What CUSTOM is: the backends of the plan. A layer is refused with the reasons of the plan."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return AttnImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return AttnMetadataBuilder

    @classmethod
    def validate_configuration(cls, **facts: Any) -> list[str]:
        """Every reason against the layer that ``facts`` describe, with values; none where the plan takes it."""
        from vllm.config import get_current_vllm_config

        if facts["use_mla"] != cls.is_mla():
            return [f"a layer of {'MLA' if facts['use_mla'] else 'MHA'} in a model whose other layers are not"]
        config = get_current_vllm_config()
        return planning.refusals(config, asked_backend(config.additional_config), facts)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        model = served()
        if model is None:
            return [MultipleOf(1)]
        base = model.blocks.multiple
        return [*model.blocks.others, *([] if base is None else [MultipleOf(base)])]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """vLLM's default where the plan can use it, else the page size of the plan."""
        if cls.supports_block_size(default_block_size):
            return default_block_size
        page_size = served_now().plan.config.page_size
        assert page_size is not None
        return page_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        named = [_LAYOUTS[layout] for layout in served_now().blocks.layouts]
        return tuple(dict.fromkeys([*(first for first, *_ in named), *(layout for group in named for layout in group)]))

    # What validate_configuration has judged with the whole layer in view; vLLM asks again here and there.

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


class AttnImpl(AttentionImpl[Step]):  # type: ignore[misc]
    """One attention layer of the model. Raises ConfigError for what no backend is known to compute."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extras: Any,
    ) -> None:
        from vllm.config import get_current_vllm_config

        serve(get_current_vllm_config())
        refuse_extras({"alibi_slopes": alibi_slopes, **extras})
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._writes = kv_sharing_target_layer_name is None
        self._layer: AttentionLayer | None = None

    def kind_of(self, layer: Any) -> LayerKind:
        """What the layer ``layer`` of vLLM, whose implementation this is, needs."""
        return LayerKind(
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            qk_head_dim=self.head_size,
            v_head_dim=layer.head_size_v,
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.logits_soft_cap,
            sinks=self.sinks is not None,
        )

    def bind(self, router: PhaseRouter, layer: AttentionLayer) -> None:
        """From now on this is ``layer`` to the backends."""
        self._layer = layer

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [T, Hq, Dqk], key [T, Hkv, Dqk], value [T, Hkv, Dv] -> output [T, Hq, Dv], filled."""
        if output_scale is not None or output_block_scale is not None:
            raise ConfigError("output that is quantised with attention", accepted="output in the model's dtype")
        if attn_metadata is None:  # a profiling run, over no cache
            return output.fill_(0)
        step, count = attn_metadata, attn_metadata.num_tokens
        if query.shape[0] != count:
            key, value = None if key is None else key[:count], None if value is None else value[:count]
            query, filled = query[:count], output[:count]
        else:
            filled = output
        assert self._layer is not None
        writes = self._writes and key is not None
        if writes and step.writes_first:
            assert key is not None
            step.backend.write_kv(key, value, self._layer, step.batch.slot_mapping)
            writes = False
        step.backend.forward(query, key, value, self._layer, step.batch, save_kv_cache=writes, out=filled)
        return output
