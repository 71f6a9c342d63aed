"""attn inside SGLang: ``--attention-backend attn`` (planned) and ``attn-NAME``, for prefill and decode apart as well.

``register`` is the entry point in the group ``sglang.srt.plugins``: SGLang calls it in every process, before it parses
its arguments. It writes names into SGLang's registries; the adapter's code is imported when one of them is chosen.
"""

from __future__ import annotations

import logging

from attn_core.engines.versions import SGLANG

_logger = logging.getLogger("sglang.attn")


def register() -> None:
    """Make our names attention backends of SGLang. In a release that was not tested: one warning, and nothing else."""
    if (line := SGLANG.refusal()) is not None:
        _logger.warning(line)
        return
    from attn_core.engines.sglang.registration import register_names

    register_names()
