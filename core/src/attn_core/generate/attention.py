"""The attention function that transformers calls in place of its own: our backend over our pages, or a refusal."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.layer import AttentionLayer

#: the attn_implementation that the function is registered as. No mask function has this name, so transformers
#: builds no mask: what a token sees is the batch's business.
IMPLEMENTATION: Final = "attn_paged"

#: keyword arguments of transformers that say nothing about what attention computes
NEUTRAL: Final = frozenset(
    {"position_ids", "use_cache", "is_causal", "cache_position", "position_embeddings", "return_dict",
     "output_attentions", "output_hidden_states", "output_router_logits"}
)  # fmt: skip


class PagedStep:
    """One forward pass: the batch, the backend it goes to, and the layers as planned. Travels as a keyword argument."""

    def __init__(self, layers: PlannedLayers, backend: AttentionBackend, batch: ForwardBatch) -> None:
        self.layers = layers
        self.backend = backend
        self.batch = batch
        #: MLA: the latent rows [T, 1, kv_lora_rank + rope] of each layer, between Cache.update and the attention call
        self.latents: dict[int, Tensor] = {}


class PlannedLayers:
    """The attention layers of a model as they were planned, each compared with what the model's code asks for.

    A module whose scale, window, soft cap or sinks are not those of the plan is refused: a backend would compute
    something else than the model means.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self.called: set[int] = set()
        self._layers: dict[int, AttentionLayer] = {}
        #: what each layer was last found to agree with, so that a step need not compare it again
        self._agreed: dict[int, tuple[float, int | None, float]] = {}

    def layer(
        self, layer_id: int, *, scale: float, sliding_window: int | None, softcap: float, sinks: Tensor | None
    ) -> AttentionLayer:
        """The planned layer. Raises ConfigError where the model asks for anything else than the plan has."""
        planned = self._layers.get(layer_id)
        asked = scale, sliding_window, softcap
        if planned is not None and planned.sinks is sinks and self._agreed.get(layer_id) == asked:
            return planned
        if planned is None or planned.sinks is not sinks:
            planned = AttentionLayer.of_kind(self.config.kind_of(layer_id), layer_id, sinks=sinks)
            self._layers[layer_id] = planned
        self.called.add(layer_id)
        facts = (
            ("scale", scale, planned.scale, math.isclose(scale, planned.scale, rel_tol=1e-6)),
            ("sliding_window", sliding_window, planned.sliding_window, self._same_window(sliding_window, planned)),
            ("softcap", softcap, planned.softcap, softcap == planned.softcap),
        )
        for name, wants, have, same in facts:
            if not same:
                raise ConfigError(
                    f"layer {layer_id}: the model's code asks for {name} {wants}, the plan has {have}",
                    given=wants,
                    accepted=have if have is None else str(have),
                    hint="the config.json and the model's code disagree; plan with the layer kinds that the code has",
                )
        self._agreed[layer_id] = asked
        return planned

    def check_all_called(self, without: frozenset[int] = frozenset()) -> None:
        """Raise ConfigError if a planned layer, but for ``without``, never asked for attention in a whole pass."""
        planned = {i for kind in self.config.cached_kinds for i in kind.layer_ids}
        if missing := sorted(planned - self.called - without):
            raise ConfigError(
                f"layers {missing} are planned as attention layers, and the model's code never asked for them",
                hint="a model whose layers go past transformers' attention interface cannot be served",
            )

    def _same_window(self, asked: int | None, planned: AttentionLayer) -> bool:
        """Windows that no sequence of the model can outgrow are all the same as none."""
        longest = self.config.max_context_len
        if longest is not None:
            asked = None if asked is not None and asked >= longest else asked
            have = planned.sliding_window
            return asked == (None if have is not None and have >= longest else have)
        return asked == planned.sliding_window


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attn_step: PagedStep | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, Hq, T, D], key and value [1, Hkv, T, D] of this step's packed tokens.

    Gives ([1, T, Hq, Dv], None). Raises ConfigError for an argument whose meaning is not known, BatchError for a pass
    without a batch.
    """
    layer_id = getattr(module, "layer_idx", None)
    if attn_step is None or layer_id is None:
        raise BatchError(
            f"{type(module).__name__} (layer {layer_id}) was called without a batch",
            accepted="a pass through PagedModel.forward, of layers that are planned",
        )
    refuse_unknown(module, attention_mask, dropout, others)
    step = attn_step
    layer = step.layers.layer(
        int(layer_id), scale=scaling, sliding_window=sliding_window, softcap=softcap or 0.0, sinks=s_aux
    )
    if layer.kind == "mla":
        return absorbed(module, query, layer, step)[None], None
    q = query[0].transpose(0, 1).contiguous()
    k: Tensor | None = key[0].transpose(0, 1).contiguous()
    v: Tensor | None = value[0].transpose(0, 1).contiguous()
    if layer.cross:
        if step.batch.encoder_slot_mapping is None:
            k = v = None
    elif not getattr(module, "is_causal", True):
        _check_spans(module, step.batch)
    out = step.backend.forward(q, k, v, layer, step.batch)
    assert isinstance(out, Tensor)
    return out[None], None


def register() -> None:
    """Make ``attend`` known to transformers as IMPLEMENTATION."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)


def refuse_unknown(module: nn.Module, mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    """Raise ConfigError for an argument of an attention call whose meaning is not known; masks and dropout are such."""
    # Mllama's cross layers hand over a mask of zeros, which PagedModel made sure of (model.py).
    if mask is None and not dropout and others.keys() <= NEUTRAL:
        return
    unknown = sorted(name for name, value in others.items() if name not in NEUTRAL and value is not None)
    if unknown or dropout or (mask is not None and bool((mask != 0).any())):
        what = f"arguments {unknown}" if unknown else "dropout" if dropout else "an attention mask"
        raise ConfigError(
            f"{type(module).__name__} asks for attention with {what}",
            accepted="scaling, sliding_window, softcap and s_aux (sinks)",
            hint="this model computes something that no backend is known to compute; it cannot be served",
        )


def _check_spans(module: nn.Module, batch: ForwardBatch) -> None:
    """A layer that is not causal sees its prefix both ways, which only the spans of the batch can say."""
    if batch.mode is not ForwardMode.DECODE and batch.spans is None:
        raise BatchError(
            f"{type(module).__name__} is not causal, and the batch says nothing of what its tokens see",
            accepted="spans for every prompt (bidirectional_spans)",
        )


def absorbed(module: nn.Module, query: Tensor, layer: AttentionLayer, step: PagedStep) -> Tensor:
    """MLA over the latent: query [1, H, T, nope + rope] -> [T, H, Dv].

    With W_UK and W_UV the key and the value half of kv_b_proj: q.(W_UK c) = (q W_UK).c, so queries are brought to the
    latent's width and keys are never expanded; values come out as latents and are expanded once for each query
    (DeepSeek-V2, section 2.1.2).
    """
    nope = int(module.qk_nope_head_dim)  # type: ignore[arg-type]
    up_keys, up_values = up_projections(module, layer)
    latent_query = torch.cat((torch.bmm(query[0, ..., :nope], up_keys), query[0, ..., nope:]), dim=-1)
    latent = step.latents.pop(layer.layer_id)
    out = step.backend.forward(latent_query.transpose(0, 1).contiguous(), latent, None, layer, step.batch)
    assert isinstance(out, Tensor)
    return torch.bmm(out.transpose(0, 1), up_values.transpose(1, 2)).transpose(0, 1)


def up_projections(module: nn.Module, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """W_UK [H, nope, R] and W_UV [H, Dv, R], views of ``module.kv_b_proj.weight`` [H * (nope + Dv), R].

    Raises ConfigError for a projection that is no plain linear layer.
    """
    projection: Any = module.kv_b_proj
    unbiased = isinstance(projection, nn.Linear) and getattr(projection, "bias", None) is None
    if not unbiased or not projection.weight.is_floating_point():
        raise ConfigError(
            f"kv_b_proj is a {type(projection).__name__}", accepted="a linear layer in floating point, without bias"
        )
    nope, width = int(module.qk_nope_head_dim), int(module.v_head_dim)  # type: ignore[arg-type]
    weight: Tensor = projection.weight.view(layer.num_q_heads, nope + width, layer.v_head_dim)
    return weight[:, :nope], weight[:, nope:]
