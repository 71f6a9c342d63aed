"""What transformers takes for its cache: it hands on what a layer would cache and keeps nothing; our pages keep it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from attn_core.generate.attention import PagedStep


class LatentTap(Cache):
    """DeepSeek caches the latent through ``Cache.update``, before it expands it: there the latent is taken."""

    def __init__(self, step: PagedStep) -> None:
        super().__init__(layers=[])
        self._step = step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Latent [1, 1, T, kv_lora_rank] and rotated key [1, 1, T, rope] -> those of the first token.

        Absorbed attention ignores the keys that the model expands from what is returned here, so one is enough.
        """
        self._step.latents[layer_idx] = torch.cat((key_states[0], value_states[0]), dim=-1).transpose(0, 1)
        return key_states[:, :, :1], value_states[:, :, :1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class EncoderTap(Cache):
    """Mllama asks whether a cross layer has its encoder's keys: it has, in our pages, once they were written.

    Every layer says that it holds one token, whose key nobody reads: a length of 0 would mean that there is no encoder.
    """

    LENGTH = 1

    def __init__(self, num_layers: int, like: Tensor) -> None:
        super().__init__(layers=[self._stub(like) for _ in range(num_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def _stub(self, like: Tensor) -> DynamicLayer:
        make: Any = DynamicLayer  # whose constructor has no types
        layer: DynamicLayer = make()
        layer.keys = layer.values = like.new_zeros(1, 1, self.LENGTH, 1)
        layer.is_initialized = True
        return layer
