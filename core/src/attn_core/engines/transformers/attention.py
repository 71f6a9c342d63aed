"""The attention function that transformers calls: over a PagedCache, over continuous batching's, or over given keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.engines.transformers.cache import Update, take_update
from attn_core.engines.transformers.given_keys import GivenKeys, Maths
from attn_core.engines.transformers.masks import StepMask, mask_of
from attn_core.engines.transformers.names import implementation_of
from attn_core.errors import BatchError, ConfigError
from attn_core.generate.attention import NEUTRAL, PagedStep, absorbed, refuse_unknown

AttentionFunction = Callable[..., tuple[Tensor, None]]


def attention_function(backend: str) -> AttentionFunction:
    """What is registered for ``backend``, a name or ``auto``."""
    given_keys = GivenKeys(backend)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query [B, Hq, Q, D], key and value [B, Hkv, K, D] -> ([B, Q, Hq, Dv], None).

        Raises ConfigError for what no backend is known to compute, BatchError for calls that contradict the cache.
        """
        if module.training:
            _refuse_gradients(module, query)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        maths = (scale, sliding_window, softcap or 0.0, s_aux)
        if cache is not None:
            from attn_core.engines.transformers.continuous import attend_packed

            return attend_packed(given_keys, module, query, key, value, cache, maths, dropout, others), None
        update = take_update(getattr(module, "layer_idx", None), key)
        if update is not None and not dropout and others.keys() <= NEUTRAL and update.cache.backend_name == backend:
            step = update.cache.plain_decode(update.layer_idx, query, attention_mask, sliding_window)
            if step is not None:
                return _decoded(module, query, update, step, maths), None
        mask = mask_of(attention_mask)
        crosses = update is not None and update.layer_idx in update.cache.cross_layers
        refuse_unknown(module, None if mask is not None or crosses else attention_mask, dropout, others)
        if mask is not None:
            mask.check_window(sliding_window)
        elif sliding_window is not None and update is not None and not crosses:
            _refuse_unmasked_window(update, query.shape[2], sliding_window)
        if update is None:
            causal = _is_causal(module, is_causal, mask)
            return given_keys.attend(query, key, value, mask, maths, causal=causal), None
        if update.cache.backend_name != backend:
            raise BatchError(
                f"a cache for {update.cache.backend_name}, called through {implementation_of(backend)!r}",
                accepted=f"a cache made after set_attn_implementation({implementation_of(backend)!r})",
            )
        if crosses:
            return _over_encoder(query, update, attention_mask, maths), None
        return _over_pages(module, query, update, mask, maths), None

    return attend


def _decoded(module: nn.Module, query: Tensor, update: Update, step: PagedStep, maths: Maths) -> Tensor:
    """What ``_over_pages`` gives, of a step whose packing and masks need not be looked at, [B, 1, Hq, Dv]."""
    scale, window, softcap, sinks = maths
    layer = step.layers.layer(update.layer_idx, scale=scale, sliding_window=window, softcap=softcap, sinks=sinks)
    assert update.keys is not None
    assert update.values is not None
    q, k, v = query.squeeze(2).contiguous(), update.keys.squeeze(2).contiguous(), update.values.squeeze(2).contiguous()
    if layer.kind == "mla":
        step.latents[update.layer_idx] = torch.cat((k, v), dim=-1)
        return absorbed(module, q.transpose(0, 1)[None], layer, step).unsqueeze(1)
    out = step.backend.forward_decode(q, k, v, layer, step.batch)
    assert isinstance(out, Tensor)
    return out.unsqueeze(1)


def _over_pages(module: nn.Module, query: Tensor, update: Update, mask: StepMask | None, maths: Maths) -> Tensor:
    """Attention of one layer over its pages, [B, Q, Hq, Dv]."""
    scale, window, softcap, sinks = maths
    step, packing = update.cache.step(update, query, mask, window)
    layer = step.layers.layer(update.layer_idx, scale=scale, sliding_window=window, softcap=softcap, sinks=sinks)
    if mask is None and not getattr(module, "is_causal", True) and packing.length > 1:
        raise BatchError(
            f"{type(module).__name__} is not causal, and its mask says nothing of what its tokens see",
            accepted="a model whose masks are made by transformers' masking_utils",
        )
    assert update.keys is not None
    assert update.values is not None
    q, k, v = packing.pack_all(query, update.keys, update.values)
    if layer.kind == "mla":
        step.latents[update.layer_idx] = torch.cat((k, v), dim=-1)
        return packing.unpack(absorbed(module, q.transpose(0, 1)[None], layer, step))
    out = step.backend.forward(q, k, v, layer, step.batch)
    assert isinstance(out, Tensor)
    return packing.unpack(out)


def _over_encoder(query: Tensor, update: Update, mask: Tensor | None, maths: Maths) -> Tensor:
    """Attention of one cross layer over its encoder's pages, [B, Q, Hq, Dv]; ``mask`` as the model made it."""
    scale, window, softcap, sinks = maths
    step, packing = update.cache.step(update, query, None, None)
    layer = step.layers.layer(update.layer_idx, scale=scale, sliding_window=window, softcap=softcap, sinks=sinks)
    k, v = (None if x is None else x.transpose(1, 2).flatten(0, 1).contiguous() for x in (update.keys, update.values))
    out = step.backend.forward(packing.pack(query), k, v, layer, update.cache.cross_batch(mask))
    assert isinstance(out, Tensor)
    return packing.unpack(out)


def _refuse_unmasked_window(update: Update, length: int, window: int) -> None:
    """Of a layer whose window leaves out keys that its mask, which is none, does not."""
    keys = update.cache.columns + (length if update.cache.begins(update.layer_idx) else 0)
    if keys > window:
        raise ConfigError(
            f"the mask has no window, the layer one of {window}, over {keys} keys",
            hint="the model's masks and its attention calls disagree; it cannot be served",
        )


def _refuse_gradients(module: nn.Module, query: Tensor) -> None:
    """Of a module in training."""
    if torch.is_grad_enabled() and query.requires_grad:
        raise ConfigError(
            f"{type(module).__name__} is in training",
            accepted="model.eval(), or torch.no_grad()",
            hint="backends compute no gradients; train with another attn_implementation",
        )


def _is_causal(module: nn.Module, is_causal: bool | None, mask: StepMask | None) -> bool:
    """Whether given keys are attended to causally, as the mask says if there is one. Raises ConfigError for spans."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return bool(causal)
    if mask.dense is not None and mask.spans(mask.window):
        raise ConfigError(
            f"{type(module).__name__} asks for tokens that see each other both ways over keys that are given",
            accepted="spans over a PagedCache",
            hint="pass past_key_values=PagedCache(model, ...), or call generate()",
        )
    return mask.causal
