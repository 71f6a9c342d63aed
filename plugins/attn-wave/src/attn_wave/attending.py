"""From rows of q, k and v to outputs: tables and work list of each part, its kernel, and that which joins the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_wave.join_variant import AnyVariant, JoinVariant
from attn_wave.joining import Once, Runs, can_take, join
from attn_wave.runtime import Kernel, chip_of, load
from attn_wave.shipped import code_of
from attn_wave.step import Part, is_capturing
from attn_wave.tables import query_rows, unit_strides
from attn_wave.variant import WIDTHS, Variant
from attn_wave.work import Heads, Work, work_of


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """Pools k and v, where each key and value begins in them for the first KV head, and the step to the next head.

    ``key_rows`` and ``value_rows`` [S] int32, and the steps, are in units.
    """

    k: Tensor
    v: Tensor
    key_rows: Tensor
    value_rows: Tensor
    key_step: int
    value_step: int


class Kernels:
    """The loaded kernels of one device, and the factors that layers call them with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[AnyVariant, Kernel] = {}
        self._factors: dict[tuple[float, float], Tensor] = {}

    def get(self, variant: AnyVariant) -> Kernel:
        """Loaded at its first use. Raises PluginLoadError, KernelError."""
        if variant not in self._loaded:
            self._loaded[variant] = load(code_of(variant, chip_of(self._device)))
        return self._loaded[variant]

    def factors(self, layer: AttentionLayer) -> Tensor:
        """[2] fp32: scale and soft cap. What is made while a graph is captured is the graph's, and made each time."""
        wanted = layer.scale, layer.softcap
        found = self._factors.get(wanted)
        if found is None:
            found = torch.stack([torch.full((), x, dtype=torch.float32, device=self._device) for x in wanted])
            if not is_capturing():
                self._factors[wanted] = found
        return found


def attend(
    kernels: Kernels,
    q: Tensor,
    keys: Keys,
    layer: AttentionLayer,
    parts: Sequence[Part],
    once: Once,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, Dv] in q's dtype and lse [T, Hq] fp32; q [T, Hq, D] with rows that can be addressed.

    ``once`` keeps what layers of the same form share in a step. ``out`` is filled, where one is given.
    """
    tokens, group = q.shape[0], layer.group_size
    heads = Heads(layer.num_kv_heads, group, unit_strides(q)[1] * group, keys.key_step, keys.value_step)
    variants = [_variant(q.dtype, layer, part, group) for part in parts]
    kind = (layer.cross, layer.sliding_window, group)
    works: list[Work] = once(("work", kind, heads, tuple(variants)), lambda: _works(parts, variants, heads, q))
    # one at least: what saw no key gets its result from there too
    count = max(1, sum(work.runs for work in works))
    rows = layer.num_kv_heads * tokens * group
    results = q.new_empty(count * rows, layer.v_head_dim, dtype=torch.float32)
    lse = q.new_full((count * rows,), float("-inf"), dtype=torch.float32)
    q_rows = once(("query rows", group, unit_strides(q)), lambda: query_rows(q, group))
    for i, (part, variant, work) in enumerate(zip(parts, variants, works, strict=True)):
        if not work.runs or not rows:
            continue
        low, high = once(("sight", kind, i), partial(part.sight.rows, group))
        tensors = {
            "q": q, "k": keys.k, "v": keys.v, "work": work.items, "query_rows": q_rows, "low": low, "high": high,
            "key_rows": keys.key_rows, "value_rows": keys.value_rows,
        }  # fmt: skip
        sizes = [work.items.shape[0], q_rows.shape[0], keys.key_rows.shape[0]]
        if part.visible is not None:
            drafts = part.visible[:, None, :].expand(-1, group, -1)
            tensors["visible"] = once(("visible", kind), drafts.contiguous)
            sizes.append(tensors["visible"].numel())
        tensors |= {"factors": kernels.factors(layer), "results": results, "run_lse": lse}
        kernels.get(variant).launch(tensors, sizes, (work.items.shape[0], 1))
    into = out if out is not None and can_take(out, q) else q.new_empty(tokens, layer.num_q_heads, layer.v_head_dim)
    joining = kernels.get(JoinVariant(layer.v_head_dim, str(q.dtype).removeprefix("torch.")))
    found, whole = join(joining, Runs(results, lse, count, tokens, layer.num_kv_heads, group), layer, into, once)
    return (found if out is None or found is out else out.copy_(found)), whole


def _works(parts: Sequence[Part], variants: Sequence[Variant], heads: Heads, q: Tensor) -> list[Work]:
    """Work of every part, on the device; the results of one part lie behind those of the part before."""
    found: list[Work] = []
    for part, variant in zip(parts, variants, strict=True):
        drafts = 0 if part.visible is None else part.visible.shape[1]
        done = sum(work.runs for work in found)
        work = work_of(part.reach, heads, variant, q.shape[0], first_run=done, num_drafts=drafts)
        found.append(Work(work.items.to(q.device), work.runs))
    return found


def _variant(dtype: torch.dtype, layer: AttentionLayer, part: Part, group: int) -> Variant:
    """Wide workgroups where requests fill them; trees are small."""
    rows = WIDTHS[layer.qk_head_dim, layer.v_head_dim]
    each = part.reach.each
    most = (each if each is not None else int(part.reach.queries.max()) if len(part.reach.queries) else 0) * group
    wide = part.visible is None and most >= rows[-1]
    return Variant(
        layer.qk_head_dim,
        layer.v_head_dim,
        str(dtype).removeprefix("torch."),
        rows[-1] if wide else rows[0],
        layer.softcap > 0,
        part.visible is not None,
    )
