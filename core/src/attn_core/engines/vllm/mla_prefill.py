"""AttnMLAPrefill: expanded MLA prefill in vLLM's prefill registry, through the feature `ragged` of the plan."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from attn_core.engines.facts import dtype_name
from attn_core.engines.vllm.planning import system_here
from attn_core.engines.vllm.selection import asked_backend
from attn_core.errors import AttnError, ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import plan
from attn_core.runtime.build import build, settle
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter


class AttnMLAPrefill(MLAPrefillBackend):  # type: ignore[misc]
    """New tokens against each other, and against pieces of the cached prefix that vLLM expands and joins by LSE."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def validate_configuration(cls, device_capability: Any, selector_config: Any) -> list[str]:
        """Every reason against expanded prefill of these widths, with values; none where the plan takes it."""
        from vllm.config import get_current_vllm_config

        config, widths = get_current_vllm_config(), selector_config.mla_dimensions
        heads = int(config.model_config.get_num_attention_heads(config.parallel_config))
        qk = widths.qk_nope_head_dim + widths.qk_rope_head_dim
        try:
            needs = _needs(heads, qk, widths.v_head_dim, qk**-0.5, dtype_name(selector_config.dtype))
            plan(needs, asked_backend(config.additional_config), system=system_here(), phases=("prefill",))
        except AttnError as error:
            return [error.message, *(line.strip() for line in error.trace)]
        return []

    @functools.cached_property
    def _built(self) -> tuple[PhaseRouter, AttentionLayer]:
        from vllm.platforms import current_platform

        dtype = self.vllm_config.model_config.dtype
        qk = self.qk_nope_head_dim + self.qk_rope_head_dim
        needs = _needs(self.num_heads, qk, self.v_head_dim, self.scale, dtype_name(dtype))
        asked = asked_backend(self.vllm_config.additional_config)
        made = settle(plan(needs, asked, system=system_here(), phases=("prefill",), fallback="allow"))
        size, layout = made.config.page_size, made.config.kv_layout
        assert size is not None
        assert layout is not None
        # A backend is built over a cache, and these layers have none.
        nothing = torch.zeros(2, size, size, 1, device=current_platform.device_type, dtype=dtype)
        router = build(made, KVCache({0: nothing}, {0: nothing}, page_size=size, layout=layout))
        return router, AttentionLayer.of_kind(needs.layers[0], 0)

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Any:
        """q, k [T, H, Dqk], v [T, H, Dv] -> [T, H, Dv] (, LSE [H, T]), causal in each request."""
        if output_scale is not None:
            raise ConfigError("output that is quantised with attention", accepted="output in the model's dtype")
        starts, longest = self._prefill_metadata.query_start_loc, int(self._prefill_metadata.max_query_len)
        return self._attend(q, k, v, starts, starts, longest, longest, True, return_softmax_lse, out)

    def run_prefill_context_chunk(
        self, chunk: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q [T, H, Dqk] against all of a piece of the prefix, k [S, H, Dqk], v [S, H, Dv] -> [T, H, Dv], LSE [H, T]."""
        lengths = int(chunk.max_query_len), int(chunk.max_seq_len)
        attended: tuple[Tensor, Tensor] = self._attend(
            q, k, v, chunk.query_start_loc, chunk.cu_seq_lens, *lengths, False, True, out
        )
        return attended

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        need_lse: bool,
        out: Tensor | None,
    ) -> Any:
        router, layer = self._built
        result = router.forward_ragged(
            q,
            k,
            v,
            layer,
            query_start_loc=query_starts,
            key_start_loc=key_starts,
            max_query_len=max_query_len,
            max_key_len=max_key_len,
            causal=causal,
            return_lse=need_lse,
            out=out,
        )
        return (result[0], result[1].transpose(0, 1).contiguous()) if need_lse else result


def _needs(heads: int, qk: int, v: int, scale: float, dtype: str) -> AttentionConfig:
    kind = LayerKind(heads, heads, qk, v, scale=scale, ragged=True, layer_ids=(0,))
    return AttentionConfig(layers=(kind,), dtype=dtype, lse=True)
