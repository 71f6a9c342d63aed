"""Continuous batching: transformers keeps the pages and gives a step's keys, packed; our backend attends to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attn_core.engines.transformers.given_keys import GivenKeys, Lengths, Maths
from attn_core.errors import ConfigError
from attn_core.generate.attention import NEUTRAL

#: what continuous batching says of a step, beside the layer's own arguments; all of it is about where its keys lie
PLACEMENT = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "block_table",
     "logits_indices", "logits_processor_args", "attention_mask"}
)  # fmt: skip


def attend_packed(
    given_keys: GivenKeys,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    maths: Maths,
    dropout: float,
    others: dict[str, Any],
) -> Tensor:
    """query [1, Hq, T, D], new key and value [1, Hkv, T, D] -> [1, T, Hq, Dv].

    ``cache.update`` writes them and gives the keys [1, Hkv, S, D] that this layer's requests can see, of a layer with a
    window those of the window. Raises ConfigError for an argument whose meaning is not known.
    """
    unknown = sorted(n for n, v in others.items() if n not in NEUTRAL | PLACEMENT and v is not None)
    if unknown or dropout:
        raise ConfigError(
            f"{type(module).__name__} asks for attention with {f'arguments {unknown}' if unknown else 'dropout'}",
            hint="this model computes something that no backend is known to compute",
        )
    if others.get("block_table") is not None:
        raise ConfigError(
            "a block table of FlashAttention's", accepted="ContinuousBatchingConfig without fast decoding"
        )
    step = dict(others)  # update() narrows it to this layer
    keys, values = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=step)
    lengths = Lengths(
        step["cu_seq_lens_q"].to(torch.int32),
        step["cu_seq_lens_k"],
        int(step["max_length_q"]),
        int(step["max_length_k"]),
    )
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, keys, values))
    return given_keys.attend_packed(q, k, v, lengths, maths, causal=True)[None]
