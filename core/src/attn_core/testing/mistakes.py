"""Which known mistake gives a wrong answer: the oracle is asked other questions, for whoever looks for the bug."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.checks import Output, output_faults
from attn_core.testing.reference import problems
from attn_core.testing.scene import Inputs
from attn_core.testing.tolerances import Precision, expect

#: What a layer or a batch is mistaken for; None where that is no mistake.
OfLayer = Callable[[AttentionLayer], AttentionLayer | None]
OfBatch = Callable[[ForwardBatch, KVCache], ForwardBatch | None]


def _window(by: int) -> OfLayer:
    return lambda layer: (
        replace(layer, sliding_window=layer.sliding_window + by)
        if layer.sliding_window is not None and layer.sliding_window + by > 0
        else None
    )


def _longer(by: int) -> OfBatch:
    return lambda batch, _: replace(batch, seq_lens=(batch.seq_lens + by).clamp(min=1))


def _consecutive(batch: ForwardBatch, cache: KVCache) -> ForwardBatch:
    columns = torch.arange(batch.page_table.shape[1], dtype=torch.int32, device=batch.device)
    return replace(batch, page_table=(batch.page_table[:, :1] + columns).clamp(max=cache.num_pages - 1))


def _transposed(batch: ForwardBatch, cache: KVCache) -> ForwardBatch | None:
    tree = batch.tree
    return None if tree is None else replace(batch, tree=TreeMask(tree.visible.transpose(1, 2).contiguous()))


def _uncausal(batch: ForwardBatch, _cache: KVCache) -> ForwardBatch | None:
    if batch.tree is not None or batch.spans is not None:
        return None
    whole = torch.stack((torch.zeros_like(batch.seq_lens), batch.seq_lens), dim=-1)
    return replace(batch, spans=whole[:, None])


def _sinks(change: Callable[[Tensor, AttentionLayer], Tensor]) -> OfLayer:
    return lambda layer: None if layer.sinks is None else replace(layer, sinks=change(layer.sinks.float(), layer))


#: Mistake -> what the layer is taken for.
LAYERS: Final[dict[str, OfLayer]] = {
    "a window of one key more": _window(1),
    "a window of one key less": _window(-1),
    "no window": lambda layer: None if layer.sliding_window is None else replace(layer, sliding_window=None),
    "no soft cap": lambda layer: replace(layer, softcap=0.0) if layer.softcap else None,
    "a soft cap before the scale": lambda layer: (
        replace(layer, softcap=layer.softcap * layer.scale) if layer.softcap else None
    ),
    "no sink": lambda layer: None if layer.sinks is None else replace(layer, sinks=None),
    "a sink that counts twice": _sinks(lambda sinks, _: sinks + math.log(2.0)),
    "a sink that is scaled like a score": _sinks(lambda sinks, layer: sinks * layer.scale),
    "a sink that is capped like a score": _sinks(
        lambda sinks, layer: layer.softcap * torch.tanh(sinks / layer.softcap) if layer.softcap else sinks
    ),
    "scores that are not scaled": lambda layer: replace(layer, scale=1.0),
    "the width of the keys to the -1/2 as scale": lambda layer: replace(layer, scale=layer.qk_head_dim**-0.5),
    "keys without their scale": lambda layer: replace(layer, k_scale=1.0) if layer.k_scale != 1 else None,
    "values without their scale": lambda layer: replace(layer, v_scale=1.0) if layer.v_scale != 1 else None,
}
#: Mistake -> what the batch is taken for.
BATCHES: Final[dict[str, OfBatch]] = {
    "sequences of one token less": _longer(-1),
    "sequences of one token more": _longer(1),
    "pages that follow each other": _consecutive,
    "a chain in place of the tree": lambda batch, _: None if batch.tree is None else replace(batch, tree=None),
    "a transposed tree": _transposed,
    "queries that see what comes after them": _uncausal,
    "no spans": lambda batch, _: None if batch.spans is None else replace(batch, spans=None),
    "the pages of the first request": lambda batch, _: replace(
        batch, page_table=batch.page_table[:1].expand_as(batch.page_table)
    ),
}
#: Mistake -> what the LSE is multiplied with.
LOG_BASES: Final = {"an LSE in base 2": 2.0, "an LSE in base 10": 10.0}


def likeness(
    output: Output, inputs: Inputs, batch: ForwardBatch, cache: KVCache, precision: Precision
) -> str | None:  # fmt: skip
    """The mistake whose right answer this is, if it is one of those known."""
    for name, layer, mistaken in _mistaken(inputs.layer, batch, cache):
        if _fits(output, inputs, layer, mistaken, cache, precision):
            return name
    in_turn = _in_turn(output, inputs)
    if in_turn is not None and _fits(*in_turn, in_turn[1].layer, batch, cache, precision):
        return "query heads that take the KV heads in turn"
    for name, base in LOG_BASES.items():
        if output.lse is not None:
            natural = Output(output.out, output.lse * torch.tensor(base).log().to(output.lse))
            if _fits(natural, inputs, inputs.layer, batch, cache, precision):
                return name
    return None


def _in_turn(output: Output, inputs: Inputs) -> tuple[Output, Inputs] | None:
    """Both with their heads in another order: that in which head h of KV heads taken in turn is one of its group."""
    layer = inputs.layer
    if layer.num_kv_heads == 1 or layer.group_size == 1:
        return None
    order = torch.arange(layer.num_q_heads).reshape(layer.group_size, layer.num_kv_heads).t().flatten()
    sinks = None if layer.sinks is None else layer.sinks[order]
    return (
        Output(output.out[:, order], None if output.lse is None else output.lse[:, order]),
        replace(inputs, layer=replace(layer, sinks=sinks), q=inputs.q[:, order]),
    )


def _mistaken(
    layer: AttentionLayer, batch: ForwardBatch, cache: KVCache
) -> Iterator[tuple[str, AttentionLayer, ForwardBatch]]:
    for name, of_layer in LAYERS.items():
        changed = of_layer(layer)
        if changed is not None:
            yield name, changed, batch
    for name, of_batch in BATCHES.items():
        other = of_batch(batch, cache)
        if other is not None:
            yield name, layer, other


def _fits(
    output: Output,
    inputs: Inputs,
    layer: AttentionLayer,
    batch: ForwardBatch,
    cache: KVCache,
    precision: Precision,
) -> bool:
    try:
        expected = expect(problems(inputs.q, layer, batch, cache), inputs.q, layer, precision)
    except (IndexError, RuntimeError):  # keys past the end of the table
        return False
    return not output_faults(output, expected, "")
