"""What must hold of a run, as comparisons that say what they found: outputs, writes, inputs, and equality of bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.testing.exact_place import exact_place
from attn_core.testing.scene import Scene, Step
from attn_core.testing.tolerances import Expected, stored_error_bound

#: Everything that can go wrong with a case: check -> what it says.
CHECKS: Final[dict[str, str]] = {
    "output": "the output is not what the oracle says",
    "lse": "the LSE is not what the oracle says",
    "form": "the result has another shape, dtype or place than the contract gives it",
    "cache_write": "the slots of the step do not hold its keys and values",
    "foreign_write": "something outside the slots of the step was written",
    "inputs": "an input was changed",
    "isolation": "what lies in pages that no request names, or past the end of a sequence, changed the output",
    "deterministic": "the same step gave other bits",
    "batch_invariant": "a request alone gave other bits than in its batch",
    "cuda_graph": "a replayed graph is wrong, waits for the host, allocates or moves",
    "witness": "another backend ran",
    "raised": "it raised",
    "refused": "declared, and refused",
    "not_refused": "not declared, and not refused (or for another reason)",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One check that failed, and what it found."""

    check: str
    message: str

    def __str__(self) -> str:
        return f"{CHECKS[self.check]}: {self.message}"


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What one forward gave."""

    out: Tensor
    lse: Tensor | None

    @classmethod
    def on_host(cls, out: Tensor, lse: Tensor | None) -> Output:
        """Copies on the host: what comes after on the device cannot change them, and they are compared there."""
        return cls(_copied(out), None if lse is None else _copied(lse))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def form_faults(output: Output, shape: tuple[int, int, int], dtype: torch.dtype, wants_lse: bool) -> list[Fault]:
    """Shapes and dtypes: out [T, Hq, Dv] like q, lse [T, Hq] fp32 if it was asked for."""
    found = []
    if tuple(output.out.shape) != shape or output.out.dtype != dtype:
        found.append(Fault("form", f"out {tuple(output.out.shape)} {output.out.dtype}, wanted {shape} {dtype}"))
    if wants_lse != (output.lse is not None):
        found.append(Fault("form", f"the LSE was {'' if wants_lse else 'not '}asked for"))
    elif output.lse is not None and (tuple(output.lse.shape) != shape[:2] or output.lse.dtype != torch.float32):
        found.append(Fault("form", f"lse {tuple(output.lse.shape)} {output.lse.dtype}, wanted {shape[:2]} float32"))
    return found


def output_faults(output: Output, expected: Expected, where: str) -> list[Fault]:
    """The output and the LSE against the oracle, within the tolerances of each value."""
    error = output.out.to(expected.out.device).double() - expected.out
    by_row = error.square().mean(-1).sqrt()
    wrong_rows = ~(by_row <= expected.row) | ~(error.abs() <= expected.value).all(-1)
    found = []
    if wrong_rows.any():
        worst = _worst(by_row / expected.row, wrong_rows)
        found.append(Fault("output", f"{where}: {_spread(wrong_rows, worst, by_row, expected.row)}"))
    if output.lse is not None:
        lse = output.lse.to(expected.lse.device).double()
        lse_error = torch.where(lse == expected.lse, 0.0, (lse - expected.lse).abs())
        wrong = ~(lse_error <= expected.lse_value)
        if wrong.any():
            worst = _worst(lse_error / expected.lse_value, wrong)
            found.append(Fault("lse", f"{where}: {_spread(wrong, worst, lse_error, expected.lse_value)}"))
    return found


def _worst(ratio: Tensor, wrong: Tensor) -> tuple[int, int]:
    """(token, head) of the largest error among the wrong ones; what is no number is larger than all."""
    ranked = torch.where(wrong, torch.nan_to_num(ratio, nan=float("inf"), posinf=float("inf")), -1.0)
    token, head = divmod(int(ranked.argmax()), ratio.shape[1])
    return token, head


def _spread(wrong: Tensor, worst: tuple[int, int], error: Tensor, allowed: Tensor) -> str:
    token, head = worst
    return (
        f"{int(wrong.sum())} of {wrong.numel()} rows; the worst is token {token}, head {head}:"
        f" error {float(error[token, head]):.3g}, allowed {float(allowed[token, head]):.3g}"
    )


def bits(tensor: Tensor) -> Tensor:
    """[*shape, bytes]: the bytes of each value, equal for equal bits, NaN among them."""
    # flat first: a dimension of one element may have any stride, and a view of bytes wants the last to have stride 1
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.view(*tensor.shape, tensor.dtype.itemsize)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def differing(first: Iterable[Output], second: Iterable[Output]) -> str | None:
    """Where two runs of the same forwards differ in a bit, None if nowhere."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        for name, x, y in (("out", a.out, b.out), ("lse", a.lse, b.lse)):
            if x is not None and y is not None and not same_bits(x, y):
                rows = (bits(x).flatten(1) != bits(y).flatten(1)).any(-1)
                token = int(rows.nonzero()[0]) if rows.any() else -1
                return f"forward {i}: {int(rows.sum())} of {x.shape[0]} rows of {name} differ, token {token} first"
    return None


def snapshot(scene: Scene, cache: KVCache) -> dict[int, tuple[Tensor, Tensor | None]]:
    """A copy of every pool, or of what the case watches of it, on the host."""
    copies = {}
    for layer_id in cache.layer_ids:
        values = cache.v(layer_id)
        keys = _copied(scene.site.watched(cache.k(layer_id)))
        copies[layer_id] = (keys, None if values is None else _copied(scene.site.watched(values)))
    return copies


def write_faults(
    scene: Scene, cache: KVCache, before: Mapping[int, tuple[Tensor, Tensor | None]], steps: Iterable[Step]
) -> list[Fault]:
    """The cache against what it was: the slots of the steps hold their keys and values, nothing else changed.

    Of a cache that is too large to be looked through, what the case watches.
    """
    steps = list(steps)
    found = []
    for layer in scene.layers:
        slots = [s[layer.layer_id] for step in steps for s in (step.written, step.write_first) if layer.layer_id in s]
        written = torch.unique(torch.cat(slots)) if slots else torch.empty(0, dtype=torch.int64)
        truth = scene.truth[layer.layer_id]
        old_k, old_v = before[layer.layer_id]
        pools = [("k", cache.k(layer.layer_id), old_k, truth.k, layer.k_scale)]
        values = cache.v(layer.layer_id)
        if values is not None and old_v is not None and truth.v is not None:
            pools.append(("v", values, old_v, truth.v, layer.v_scale))
        for name, now, old, rows, scale in pools:
            where, seen = f"layer {layer.layer_id}, {name}", scene.site.watched(now)
            found += _pool_faults(where, scene, seen, old, rows, scale, written)
    return found


def _pool_faults(
    where: str, scene: Scene, now: Tensor, old: Tensor, truth: Tensor, scale: float, written: Tensor
) -> list[Fault]:
    now, old, truth, written = (t.to(exact_place(t.device)) for t in (now, old, truth, written))
    by_slot, was = _slot_rows(now, scene.case.layout), _slot_rows(old, scene.case.layout)
    changed = (bits(by_slot).flatten(1) != bits(was).flatten(1)).any(-1)
    allowed = torch.zeros_like(changed)
    allowed[written] = True
    found = []
    foreign = (changed & ~allowed).nonzero().flatten().tolist()
    if foreign:
        page, offset = divmod(foreign[0], scene.page_size)
        found.append(Fault("foreign_write", f"{where}: {len(foreign)} slots, first page {page} offset {offset}"))
    limit = float("inf") if now.dtype.itemsize > 1 else torch.finfo(now.dtype).max
    wanted = (truth[written].double() / scale).clamp(-limit, limit)
    held = stored_values(by_slot, written)
    wrong = ~((held - wanted).abs() <= stored_error_bound(wanted, now.dtype, truth.dtype))
    if wrong.any():
        slot = int(written[wrong.flatten(1).any(-1).nonzero()[0]])
        page, offset = divmod(slot, scene.page_size)
        count = int(wrong.flatten(1).any(-1).sum())
        found.append(
            Fault("cache_write", f"{where}: {count} of {len(written)} slots, first page {page} offset {offset}")
        )
    return found


def _slot_rows(pool: Tensor, layout: str) -> Tensor:
    """A pool as [slots, H, D], in its own dtype."""
    nhd = pool.transpose(1, 2) if layout == "HND" else pool if layout == "NHD" else pool.unsqueeze(2)
    return nhd.reshape(-1, *nhd.shape[2:])


class InputGuard:
    """Copies of a step's tensors on the host, to see afterwards that none was changed."""

    def __init__(self, step: Step) -> None:
        self._tensors = _tensors_of(step)
        self._copies = {name: _copied(tensor) for name, tensor in self._tensors.items()}

    def faults(self) -> list[Fault]:
        """One for each tensor that is not what it was."""
        changed = [name for name, tensor in self._tensors.items() if not same_bits(tensor.cpu(), self._copies[name])]
        return [Fault("inputs", f"{name} was changed in place") for name in changed]


def _tensors_of(step: Step) -> dict[str, Tensor]:
    named: dict[str, object] = {f.name: getattr(step.batch, f.name) for f in fields(ForwardBatch)}
    named["tree"] = None if step.batch.tree is None else step.batch.tree.visible
    for inputs in step.inputs:
        for name in ("q", "k", "v"):
            named[f"layer {inputs.layer.layer_id}: {name}"] = getattr(inputs, name)
        named[f"layer {inputs.layer.layer_id}: sinks"] = inputs.layer.sinks
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def stored_values(rows: Tensor, slots: Tensor) -> Tensor:
    """rows [slots, H, D] at these slots in fp64, also where torch cannot index the dtype."""
    if rows.dtype not in FP8_DTYPES:
        return rows[slots].double()
    return rows.view(torch.uint8)[slots].view(rows.dtype).double()
