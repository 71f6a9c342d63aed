"""PagedModel: transformers' modules and weights, run over our batches, our pages and the backends of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from attn_core.errors import BatchError, ConfigError
from attn_core.generate.attention import IMPLEMENTATION, PagedStep, PlannedLayers, register
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode

#: rope whose frequencies follow the longest sequence of a call: in a batch, one request would turn another's keys
BATCH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")
#: architectures whose cross layers are known to work over our pages
CROSS_ARCHITECTURES: Final = ("mllama", "mllama_text_model")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model's code does beside its attention calls, by ``model_type``."""

    #: the position of the first token
    first_position: int = 0
    #: tokens of one span see each other even where the window ends between them; the contract's windows still bound
    spans_pass_windows: bool = False


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "paligemma": Architecture(first_position=1, spans_pass_windows=True),
}


class PagedModel:
    """A decoder-only transformers model whose attention is the planned backends' over the paged cache.

    The model's code is not changed: its attention calls come to ``attend`` (attention.py), its cache is a tap
    (cache_taps.py). ``config`` is the plan's; vision towers keep the attention that transformers gave them.
    """

    def __init__(self, model: Any, config: AttentionConfig, backend: AttentionBackend) -> None:
        """Raises ConfigError for a model whose code is known to compute what the contract cannot say."""
        self.model = model
        self.config = config
        self.backend = backend
        self.layers = PlannedLayers(config)
        self.architecture = ARCHITECTURES.get(str(model.config.model_type), Architecture())
        self._latent = any(kind.kind == "mla" for kind in config.cached_kinds)
        self._cross = frozenset(i for kind in config.cached_kinds if kind.cross for i in kind.layer_ids)
        self._windows = [kind.sliding_window for kind in config.cached_kinds if kind.sliding_window is not None]
        self._complete = False
        check_served(model.config, has_cross=bool(self._cross))
        register()
        use_paged_attention(model)
        model.eval()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        batch: ForwardBatch,
        *,
        logits_at: Tensor | None = None,
        sees_encoder: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Logits [n, V] after the tokens at ``logits_at`` [n] int64, rows of this step; of all T tokens if None.

        tokens: [T] int64, packed as in ``batch``. ``inputs`` are further arguments of the model's forward: the
        pixel_values of this step's images, in the order of their requests. ``sees_encoder`` [T] bool, for cross layers:
        False for tokens before their image; None if there are none. transformers masks the MLP of those tokens and lets
        their attention see every key, those of padding tiles too: with padding they are a chunk of their own, whose
        encoder_seq_lens counts it.
        Raises BatchError for a batch that this model cannot mean.
        """
        self._check_batch(tokens, batch)
        self.backend.init_forward_metadata(batch)
        return self.run(tokens, batch, logits_at=logits_at, sees_encoder=sees_encoder, inputs=inputs)

    @torch.inference_mode()
    def run(
        self,
        tokens: Tensor,
        batch: ForwardBatch,
        *,
        logits_at: Tensor | None = None,
        sees_encoder: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """``forward`` of a batch whose metadata is prepared, as a graph is captured."""
        step = PagedStep(self.layers, self.backend, batch)
        outputs = self.model(
            input_ids=tokens[None],
            position_ids=(positions_of(batch) + self.architecture.first_position)[None],
            logits_to_keep=0 if logits_at is None else logits_at,
            attn_step=step,
            **self._cache_arguments(step, sees_encoder),
            **(inputs or {}),
        )
        if not self._complete:
            self.layers.check_all_called(frozenset() if batch.encoder_seq_lens is not None else self._cross)
            self._complete = True
        logits = outputs.logits[0]
        assert isinstance(logits, Tensor)
        return logits

    def _cache_arguments(self, step: PagedStep, sees_encoder: Tensor | None) -> dict[str, Any]:
        from attn_core.generate.cache_taps import EncoderTap, LatentTap

        if self._latent:
            return {"past_key_values": LatentTap(step), "use_cache": True}
        if step.batch.encoder_seq_lens is None:
            return {"use_cache": False}
        tap = EncoderTap(self.model.config.get_text_config().num_hidden_layers, next(self.model.parameters()))
        if sees_encoder is None:
            return {"past_key_values": tap, "use_cache": True}
        # One image of one tile stands for all: how many of its keys a request sees is encoder_seq_lens' business. The
        # model cuts the mask at the length of the cache, so a row for the tap's token stands before it.
        rows = torch.cat((sees_encoder.new_ones(EncoderTap.LENGTH), sees_encoder)).to(torch.float32)
        return {"past_key_values": tap, "use_cache": True, "cross_attention_mask": rows[None, :, None, None]}

    def _check_batch(self, tokens: Tensor, batch: ForwardBatch) -> None:
        if tokens.shape != (batch.num_tokens,):
            raise BatchError(f"tokens {tuple(tokens.shape)} for {batch.num_tokens} slots", accepted="one a slot")
        if batch.encoder_seq_lens is not None and not self._cross:
            raise BatchError("a batch with encoder keys for a model without cross layers")
        if batch.encoder_seq_lens_cpu is not None and not bool((batch.encoder_seq_lens_cpu > 0).all()):
            raise BatchError(
                f"encoder lengths {batch.encoder_seq_lens_cpu.tolist()}",
                accepted="an encoder for each request of the batch, or for none: then cross layers are skipped",
            )
        if batch.spans is not None and not self.config.bidirectional_spans:
            raise BatchError("spans for a plan without bidirectional_spans", hint="plan with bidirectional_spans=True")
        if batch.spans is not None and self.architecture.spans_pass_windows and self._windows:
            longest = int((batch.spans[..., 1] - batch.spans[..., 0]).max())
            if longest > min(self._windows):
                raise BatchError(
                    f"a span of {longest} tokens over a window of {min(self._windows)}",
                    accepted=f"spans of up to {min(self._windows)} tokens: this model's spans reach past its windows",
                )


def positions_of(batch: ForwardBatch) -> Tensor:
    """[T] int64: the position of each new token in its sequence, from 0; without host synchronisation.

    Draft tokens of a tree stand at the prefix length plus the number of their ancestors. The one token of a padded
    request, whose length may be 0, is at 0.
    """
    if batch.mode is ForwardMode.DECODE:
        return (batch.seq_lens.long() - 1).clamp(min=0)
    starts = batch.query_start_loc.long()
    query_lens = starts[1:] - starts[:-1]
    before = batch.seq_lens.long() - query_lens
    if batch.tree is not None:
        return (before[:, None] + batch.tree.depths()).flatten()
    rows = torch.arange(batch.num_tokens, device=batch.device)
    return rows + torch.repeat_interleave(before - starts[:-1], query_lens, output_size=batch.num_tokens)


def use_paged_attention(model: Any) -> None:
    """Point the text layers of ``model`` to IMPLEMENTATION; vision and audio towers keep what they have."""
    composite = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": IMPLEMENTATION} if composite else IMPLEMENTATION)


def check_served(config: Any, *, has_cross: bool) -> None:
    """Raise ConfigError for a transformers config whose model would compute something else in a packed batch."""
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{config.model_type} is an encoder-decoder", accepted="decoder-only models")
    if has_cross and text.model_type not in CROSS_ARCHITECTURES:
        raise ConfigError(
            f"cross layers of {text.model_type}", given=text.model_type, accepted=", ".join(CROSS_ARCHITECTURES)
        )
    if batch_dependent := sorted(set(rope_types(text)) & set(BATCH_DEPENDENT_ROPE)):
        raise ConfigError(
            f"{text.model_type} has rope of type {batch_dependent[0]}, which follows the longest sequence of a batch",
            accepted="rope whose frequencies are the same for every length",
            hint="requests of one batch would change each other's results",
        )


def rope_types(config: Any) -> list[str]:
    """The rope types of a config, one for all layers or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [str(entry.get("rope_type", "default")) for entry in (nested or [parameters])]
