"""AttnCpuPlatform: vLLM's CPU platform, but obeying ``--attention-backend CUSTOM``, which vLLM's own passes over."""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from attn_core.errors import ConfigError

#: what vLLM would have chosen: its CPU platform, or the one of AMD's library
_Chosen: Any = resolve_obj_by_qualname(cpu_platform_plugin())


class AttnCpuPlatform(_Chosen):  # type: ignore[misc]
    """The platform as it is, until CUSTOM is asked for."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """As on CUDA: the class of the backend that was asked for, or ValueError with every reason against it."""
        if not _is_custom(selected_backend):
            return str(super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads))
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(
                f"Selected backend {selected_backend} is not valid for this configuration. Reason: {reasons}"
            )
        return ".".join(backend.full_cls_name())

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: Any) -> Any:
        """CUSTOM if ``mla_prefill_backend`` says so; vLLM does not look at that option on a CPU."""
        from vllm.config import get_current_vllm_config
        from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

        asked = get_current_vllm_config().attention_config.mla_prefill_backend
        if asked is not MLAPrefillBackendEnum.CUSTOM:
            return super().get_mla_prefill_backend_cls(mla_selector_config)
        backend = asked.get_class()
        if reasons := backend.validate_configuration(None, mla_selector_config):
            raise ValueError(f"Selected MLA prefill backend {asked.name} is not valid. Reason: {reasons}")
        return backend

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """vLLM's changes for a CPU, without those that its own MLA kernels need."""
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        asked = [
            (part, name, getattr(part, name))
            for part, name in (
                (cache, "block_size"),
                (cache, "enable_prefix_caching"),
                (scheduler, "enable_chunked_prefill"),
                (scheduler, "max_num_batched_tokens"),
            )
        ]
        super().check_and_update_config(vllm_config)
        model = vllm_config.model_config
        if _is_custom(vllm_config.attention_config.backend) and model is not None and model.use_mla:
            for part, name, value in asked:
                setattr(part, name, value)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """After the model is made: a block size that the plan has, where the user gave none."""
        super().update_block_size_for_backend(vllm_config)
        from vllm.config import set_current_vllm_config

        cache = vllm_config.cache_config
        with set_current_vllm_config(vllm_config):
            ours = [backend for backend in cls._find_non_ssm_backends(vllm_config) if backend.get_name() == "CUSTOM"]
            for backend in ours:
                if not cache.user_specified_block_size:
                    cache.block_size = backend.get_preferred_block_size(cache.block_size)
                elif not backend.supports_block_size(cache.block_size):
                    raise ConfigError(f"block_size {cache.block_size} with {backend.get_name()}")


def _is_custom(backend: Any) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return backend is AttentionBackendEnum.CUSTOM and backend.is_overridden()
