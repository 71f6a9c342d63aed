"""What the user asked for: ATTN_BACKEND, or ``attn_backend`` in vLLM's additional_config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from attn_core.errors import UsageError, nearest
from attn_core.planning.plan import AUTO, parse_backend

VARIABLE: Final = "ATTN_BACKEND"
OPTION: Final = "attn_backend"


def asked_backend(additional_config: Any, environ: Mapping[str, str] | None = None) -> str:
    """``auto``, a name, or ``prefill=a,decode=b``; additional_config comes before the environment, which is shared.

    Raises UsageError for what is malformed, and for an option of additional_config that is nearly ours.
    """
    options = additional_config if isinstance(additional_config, Mapping) else {}
    for key in options:
        if str(key).startswith("attn") and key != OPTION:
            near = nearest(str(key), (OPTION,))
            raise UsageError(
                f"additional_config has {key!r}",
                given=key,
                accepted=OPTION,
                hint=f"did you mean {near!r}?" if near else None,
            )
    asked = options.get(OPTION) or (os.environ if environ is None else environ).get(VARIABLE) or AUTO
    if not isinstance(asked, str):
        raise UsageError(f"{OPTION} is {asked!r}", given=asked, accepted="a text: a name, or prefill=a,decode=b")
    parse_backend(asked)
    return asked.strip()
