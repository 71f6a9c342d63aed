"""attn inside vLLM: ``--attention-backend CUSTOM`` runs what ATTN_BACKEND names, planned when the model is loaded.

Entry points call ``register`` (``vllm.general_plugins``, in every process of vLLM) and ``cpu_platform``
(``vllm.platform_plugins``). Neither does anything but write names into vLLM's registries: the adapter's code is
imported when vLLM looks the backend up, which it does for CUSTOM only.
"""

from __future__ import annotations

import logging
from typing import Final

from attn_core.engines.versions import VLLM

#: what vLLM resolves the backend CUSTOM and the MLA prefill backend CUSTOM to
BACKEND: Final = "attn_core.engines.vllm.selected.Backend"
MLA_PREFILL: Final = "attn_core.engines.vllm.mla_prefill.AttnMLAPrefill"
CPU_PLATFORM: Final = "attn_core.engines.vllm.cpu_platform.AttnCpuPlatform"

_logger = logging.getLogger("vllm.attn")


def register() -> None:
    """Make ours what vLLM calls CUSTOM. In a release that was not tested: one warning, and nothing is registered."""
    if (line := VLLM.refusal()) is not None:
        _logger.warning(line)
        return
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    taken = AttentionBackendEnum.CUSTOM
    if taken.is_overridden() and taken.get_path() != BACKEND:
        _logger.warning("attn: not registered with vLLM, since CUSTOM is %s already", taken.get_path())
        return
    register_backend(taken, BACKEND)
    register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, MLA_PREFILL)


def cpu_platform() -> str | None:
    """The CPU platform that obeys ``--attention-backend CUSTOM``, where vLLM would choose its own, which does not.

    None elsewhere, and in a release that was not tested (``register`` says so).
    """
    if VLLM.refusal() is not None:
        return None
    from vllm.platforms import cpu_platform_plugin

    return CPU_PLATFORM if cpu_platform_plugin() is not None else None
