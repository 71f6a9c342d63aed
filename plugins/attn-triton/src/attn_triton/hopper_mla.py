"""Binding the Gluon kernel of MLA decode: where it is taken, and its copy-engine descriptors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
from torch import Tensor

from attn_triton.chip import Chip
from attn_triton.kinds import BoundLayer, Kind, value_scale
from attn_triton.launch import Bound, Launchers
from attn_triton.parameters import FORCED, DecodeTile
from attn_triton.step import Step
from attn_triton.strided import UNIT

if TYPE_CHECKING:
    from attn_triton.partition import Partition

#: What the kernel is written for: 64 rows, 64 keys, three roles of 4 warps, two tiles in flight; pieces of at least
#: four tiles.
TILE: Final = DecodeTile(block_m=64, block_n=64, warps=4, stages=2, per_sm=1, least_blocks=4)
WIDTH, VALUE_WIDTH = 576, 512
#: The releases of Triton whose Gluon the kernels are written in; with others the plain kernels run.
GLUON_SERIES: Final = "3.6."

#: Positions of the arguments that change from layer to layer: out, lse.
MOVING: Final = (7, 8)
#: The descriptors of queries and pool; token and head stride of out; scale and the values' scale.
BOXES, STRIDES, SCALES = slice(0, 4), slice(15, 17), slice(18, 20)


def takes(chip: Chip, kind: Kind, step: Step | None) -> bool:
    """Whether the kernel computes layers of ``kind`` in ``step`` (None: in some step). Everything else is the plain
    kernel's.
    """
    g = kind.geometry
    fits = (
        g.values_in_keys
        and (g.qk_dim, g.v_dim) == (WIDTH, VALUE_WIDTH)
        and g.dtype in (torch.bfloat16, torch.float16)
        and g.kv_dtype == g.dtype
        and g.page_size % 64 == 0
        and (g.k.token, g.k.page) == (WIDTH, WIDTH * g.page_size)
    )
    plain = kind.window is None and not kind.has_cap and kind.sinks is None and not kind.cross
    return (
        fits
        and plain
        and chip.sm == 90
        and (step is None or step.tree is None)
        and FORCED.get("gluon", True)
        and gluon_known()
    )


@dataclass(slots=True, eq=False)
class BoundMla:
    """The kernel for one kind of layers in one step, ready to launch: by the unit of the output's strides."""

    make: Callable[[int], Bound]
    made: dict[int, Bound]
    grid: int
    pools: dict[int, tuple[Any, Any]]

    def run(self, q: Tensor, out: Tensor, lse: Tensor | None, bound: BoundLayer, scale: tuple[float, float]) -> None:
        """Whole rows into out and lse, parts into the workspace."""
        token, head = out.stride()[:2]
        unit = 1 if (token | head) % UNIT else UNIT
        attend = self.made.get(unit)
        if attend is None:
            attend = self.made[unit] = self.make(unit)
        pool = self.pools.get(bound.layer.layer_id)
        if pool is None:
            pool = self.pools[bound.layer.layer_id] = boxes(bound.k_pool, VALUE_WIDTH // 2)
        attend.place(out, lse)
        attend.values[BOXES] = (*boxes(q), *pool)
        attend.values[STRIDES] = (token // unit, head // unit)
        attend.values[SCALES] = (scale[0], value_scale(bound.layer))
        attend.launch(self.grid)


def bind(
    launchers: Launchers,
    step: Step,
    layer: BoundLayer,
    partition: Partition,
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
) -> BoundMla:
    """What layers of the kind of ``layer`` launch in ``step``; the tensors give the dtypes."""
    from attn_triton.kernels.gluon_mla import mla_kernel

    geometry, cut, plan, keys = layer.kind.geometry, partition.cut, partition.plan, partition.keys
    constants = {
        "H": geometry.group, "TILES": cut.tiles, "PAGE": geometry.page_size, "FIXED": cut.fixed, "SINGLE": step.single,
        "HAS_LSE": lse is not None, "NB": TILE.stages,
    }  # fmt: skip
    args = [
        *boxes(q), *boxes(layer.k_pool, VALUE_WIDTH // 2), keys.pages, keys.lengths, step.starts, out,
        partition.part_lse if lse is None else lse, partition.part_out, partition.part_lse, plan.line, plan.bounds,
        plan.first, cut.splits, 0, 0, keys.pages.stride(0), 1.0, 1.0,
    ]  # fmt: skip

    def make(unit: int) -> Bound:
        sized = {**constants, "UNIT": unit}
        dtypes = (out.dtype, geometry.dtype)
        return Bound(launchers.get(mla_kernel, sized, {"num_warps": TILE.warps}, dtypes), args, moving=MOVING)

    return BoundMla(make, {}, cut.groups * cut.tiles, {})


def boxes(rows: Tensor, width: int = VALUE_WIDTH) -> tuple[Any, Any]:
    """Descriptors of rows [..., 576] in boxes of [64, ``width``] and [64, 64], as the copy engine takes them."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    flat = rows.reshape(-1, WIDTH)
    layout = box_layout()
    return tuple(TensorDescriptor(flat, list(flat.shape), [WIDTH, 1], [64, n], layout) for n in (width, 64))


@functools.cache
def gluon_known() -> bool:
    """Whether this Triton has the Gluon that our kernels were checked with: the language is experimental, and its names
    and their meaning change with every release.
    """
    return bool(triton.__version__.startswith(GLUON_SERIES))


@functools.cache
def box_layout() -> Any:
    """The layout of a 16-bit box in shared memory: 128-byte swizzle."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
