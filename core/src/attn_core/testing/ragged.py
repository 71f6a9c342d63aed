"""Ragged attention of one case: keys and values are arguments, and nothing of the cache takes part."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Every ragged layer of the case against the oracle; inputs unchanged, bits repeated and the same alone if asked"""
    return [fault for layer in scene.layers for fault in _layer_faults(backend, scene, layer, precision)]


def _layer_faults(backend: AttentionBackend, scene: Scene, layer: AttentionLayer, precision: Precision) -> list[Fault]:
    case = scene.case
    given = _Given.of(scene, layer)
    copies = [tensor.clone() for tensor in (given.q, given.k, given.v)]
    output = given.run(backend, scene)
    found = form_faults(
        output, (given.q.shape[0], layer.num_q_heads, layer.v_head_dim), given.q.dtype, "lse" in case.options
    )
    if not found:
        every = ragged_problems(
            given.q, given.k, given.v, layer,
            query_start_loc=_starts(given.new, scene.device),
            key_start_loc=_starts(given.keys, scene.device),
            causal=case.kind_of(layer.layer_id).causal,
        )  # fmt: skip
        found += output_faults(output, expect(every, given.q, layer, precision), f"layer {layer.layer_id}")
    for name, now, copy in zip("qkv", (given.q, given.k, given.v), copies, strict=True):
        found += [] if same_bits(now, copy) else [Fault("inputs", f"{name} was changed in place")]
    if "twice" in case.options:
        where = differing([output], [given.run(backend, scene)])
        found += [Fault("deterministic", where)] if where else []
    if "alone" in case.options:
        found += _alone_faults(backend, scene, given, output)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """The arguments of one call: requests of ``new`` queries and ``keys`` keys each, one after the other."""

    layer: AttentionLayer
    q: Tensor
    k: Tensor
    v: Tensor
    new: list[int]
    keys: list[int]

    @classmethod
    def of(cls, scene: Scene, layer: AttentionLayer) -> _Given:
        new, keys = [r.new for r in scene.case.requests], [r.seq_len for r in scene.case.requests]
        return cls(layer, *scene.ragged_inputs(layer, sum(new), sum(keys)), new, keys)

    def only(self, b: int) -> _Given:
        """Request ``b`` alone."""
        rows, keys = self.rows(b), slice(sum(self.keys[:b]), sum(self.keys[: b + 1]))
        return _Given(self.layer, self.q[rows], self.k[keys], self.v[keys], [self.new[b]], [self.keys[b]])

    def rows(self, b: int) -> slice:
        """The queries of request ``b``."""
        return slice(sum(self.new[:b]), sum(self.new[: b + 1]))

    def run(self, backend: AttentionBackend, scene: Scene) -> Output:
        """What the backend makes of it, asked for what the case asks for."""
        case, layer, q = scene.case, self.layer, self.q
        out = torch.full(
            (q.shape[0], layer.num_q_heads, layer.v_head_dim), float("nan"), dtype=q.dtype, device=q.device
        )
        result = backend.forward_ragged(
            q, self.k, self.v, layer,
            query_start_loc=_starts(self.new, scene.device),
            key_start_loc=_starts(self.keys, scene.device),
            max_query_len=max(self.new),
            max_key_len=max(self.keys),
            causal=case.kind_of(layer.layer_id).causal,
            return_lse="lse" in case.options,
            out=out if "out" in case.options else None,
        )  # fmt: skip
        values, lse = result if isinstance(result, tuple) else (result, None)
        if "out" in case.options and values.data_ptr() != out.data_ptr():
            raise AssertionError("out= was given, and another tensor came back")
        return Output.on_host(values, lse)


def _alone_faults(backend: AttentionBackend, scene: Scene, given: _Given, together: Output) -> list[Fault]:
    """The first request that gives other bits alone than in its batch."""
    for b, count in enumerate(given.new):
        if not count:
            continue
        rows = given.rows(b)
        in_company = Output(together.out[rows], None if together.lse is None else together.lse[rows])
        where = differing([given.only(b).run(backend, scene)], [in_company])
        if where is not None:
            return [Fault("batch_invariant", f"request {b}: {where}")]
    return []


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
