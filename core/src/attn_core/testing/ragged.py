"""Ragged attention of one case: keys and values are arguments, and nothing of the cache takes part."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.checks import Fault, Output, differing, form_faults, output_faults, same_bits
from attn_core.testing.reference import ragged_problems
from attn_core.testing.scene import Scene
from attn_core.testing.tolerances import Precision, expect


def ragged_faults(backend: AttentionBackend, scene: Scene, precision: Precision) -> list[Fault]:
    """Every ragged layer of the case against the oracle, with its inputs unchanged, and bits repeated if it says so."""
    return [fault for layer in scene.layers for fault in _layer_faults(backend, scene, layer, precision)]


def _layer_faults(backend: AttentionBackend, scene: Scene, layer: AttentionLayer, precision: Precision) -> list[Fault]:
    case, requests = scene.case, scene.case.requests
    causal = case.kinds[layer.layer_id].causal
    starts = _starts([r.new for r in requests], scene.device)
    key_starts = _starts([r.seq_len for r in requests], scene.device)
    q, k, v = scene.ragged_inputs(layer, int(starts[-1]), int(key_starts[-1]))
    copies = [tensor.clone() for tensor in (q, k, v)]
    wants_lse = "lse" in case.options

    def call() -> Output:
        out = torch.full(
            (q.shape[0], layer.num_q_heads, layer.v_head_dim), float("nan"), dtype=q.dtype, device=q.device
        )
        result = backend.forward_ragged(
            q, k, v, layer,
            query_start_loc=starts,
            key_start_loc=key_starts,
            max_query_len=max(r.new for r in requests),
            max_key_len=max(r.seq_len for r in requests),
            causal=causal,
            return_lse=wants_lse,
            out=out if "out" in case.options else None,
        )  # fmt: skip
        given, lse = result if isinstance(result, tuple) else (result, None)
        if "out" in case.options and given.data_ptr() != out.data_ptr():
            raise AssertionError("out= was given, and another tensor came back")
        return Output(given.clone(), lse)

    output = call()
    found = form_faults(output, (q.shape[0], layer.num_q_heads, layer.v_head_dim), q.dtype, wants_lse)
    if not found:
        every = ragged_problems(q, k, v, layer, query_start_loc=starts, key_start_loc=key_starts, causal=causal)
        found += output_faults(output, expect(every, q, layer, precision), f"layer {layer.layer_id}")
    for name, now, copy in zip("qkv", (q, k, v), copies, strict=True):
        found += [] if same_bits(now, copy) else [Fault("inputs", f"{name} was changed in place")]
    if "twice" in case.options:
        where = differing([output], [call()])
        found += [Fault("deterministic", where)] if where else []
    return found


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
