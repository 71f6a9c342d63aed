"""attn inside transformers: ``register()`` makes ``attn_implementation="attn"`` (planned) and ``"attn-NAME"``.

``model.generate`` then runs over a PagedCache, which it makes by itself; calls without one give keys of their own to
the backend (feature `ragged`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_core.engines.transformers.cache import PagedCache as PagedCache
    from attn_core.engines.transformers.registration import register as register

__all__ = ["PagedCache", "register"]


def __getattr__(name: str) -> Any:
    if name == "register":
        from attn_core.engines.transformers.registration import register

        return register
    if name == "PagedCache":
        from attn_core.engines.transformers.cache import PagedCache

        return PagedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
