"""What vLLM's name CUSTOM stands for: one class for each way in which vLLM may run the model's attention.

vLLM resolves one path, ``Backend``, and asks the class that it finds whether it is MLA: so the attribute is looked up
anew for every layer, by the model that is being made.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    from attn_core.engines.vllm import planning

    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    if config is None or model is None or not model.use_mla:
        from attn_core.engines.vllm.backend import AttnBackend

        return AttnBackend
    if planning.prefills_expanded(config):
        from attn_core.engines.vllm.mla_expanded import AttnMLAExpanded

        return AttnMLAExpanded
    from attn_core.engines.vllm.mla import AttnMLABackend

    return AttnMLABackend
