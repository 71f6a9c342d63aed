"""register(): our implementations made known to transformers, and the places where it must know more than names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from attn_core.engines.transformers.names import backend_of, implementation_of, key_of
from attn_core.engines.versions import TRANSFORMERS
from attn_core.errors import ConfigError
from attn_core.planning.discovery import discover
from attn_core.planning.plan import AUTO

#: guesses that a verify step may have where generate() does not say how many its assistant makes
ASSISTANT_DRAFT_TOKENS: Final = 32

_registered: set[str] = set()


def register() -> tuple[str, ...]:
    """Make ``attn`` and ``attn-NAME`` of every installed backend an attn_implementation; gives those names.

    May be called again, when backends were added. Raises ProtocolError for a release of transformers that the adapter
    was not tested with.
    """
    TRANSFORMERS.require()
    from transformers import AttentionInterface, AttentionMaskInterface

    from attn_core.engines.transformers.attention import attention_function
    from attn_core.engines.transformers.masks import step_mask

    names = [AUTO, *dict.fromkeys(ref.listed for ref in discover().backends)]
    for backend in names:
        if backend not in _registered:
            key = key_of(implementation_of(backend))
            AttentionInterface.register(key, attention_function(backend))
            AttentionMaskInterface.register(key, step_mask)
            _registered.add(backend)
    _hook_once()
    return tuple(implementation_of(backend) for backend in names)


@functools.cache
def _hook_once() -> None:
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _with_our_names)
    _wrap(GenerationMixin, "_prepare_cache_for_generation", _with_our_cache)
    _wrap(ContinuousBatchingManager, "switch_to_cb_friendly_attn", _friendly)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapper)


def _with_our_names(original: Callable[..., Any], model: Any, implementation: str | None, *args: Any, **kw: Any) -> Any:
    """A backend with "flash" in its name is not transformers' FlashAttention."""
    return original(model, key_of(implementation) if implementation else implementation, *args, **kw)


def _with_our_cache(
    original: Callable[..., Any],
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """generate() makes a PagedCache for a model of ours that was given no cache."""
    ours = backend_of(model.config.get_text_config()._attn_implementation) is not None
    given = model_kwargs.get("past_key_values")
    if not ours or generation_config.use_cache is False or generation_config.cache_implementation is not None:
        return original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    from attn_core.engines.transformers.cache import PagedCache

    drafts = _draft_tokens(generation_config, generation_mode)
    room = {
        "max_batch_size": batch_size * max(generation_config.num_beams, generation_config.num_return_sequences),
        "max_seq_len": max_cache_length + drafts + 1,
    }
    if isinstance(given, PagedCache) and given.grows:
        given.make_room(model, **room)
    if given is not None:
        return original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = PagedCache(model, **room, max_draft_tokens=drafts, max_images=_images(model_kwargs))
    cache.grows = True
    model_kwargs["past_key_values"] = cache
    return None


def _images(model_kwargs: dict[str, Any]) -> int:
    """The images of a request, for models with cross layers: pixel_values are [B, images, tiles, ...]."""
    pixels = model_kwargs.get("pixel_values")
    return 1 if pixels is None else int(pixels.shape[1])


def _draft_tokens(generation_config: Any, generation_mode: Any) -> int:
    """How many tokens a step that checks guesses may have: the guesses, and the token before them."""
    if generation_mode.value != "assisted_generation":
        return 0
    return int(generation_config.prompt_lookup_num_tokens or ASSISTANT_DRAFT_TOKENS) + 1


def _friendly(original: Callable[..., Any], manager: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Continuous batching may use our implementations, which it does not list. Raises ConfigError for latent caches."""
    if backend_of(model.config._attn_implementation) is None:
        return original(manager, model, *args, **kwargs)
    if getattr(model.config.get_text_config(), "kv_lora_rank", None):
        raise ConfigError(
            f"continuous batching of {model.config.model_type}: transformers' pages have no room for a latent",
            hint="generate() serves it, or attn generate, which batches continuously",
        )
    return None
