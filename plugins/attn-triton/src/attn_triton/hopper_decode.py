"""Binding the Gluon kernel of decode over an fp8 cache: where it is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from attn_triton.chip import Chip
from attn_triton.hopper_mla import gluon_known
from attn_triton.kinds import BoundLayer, Kind
from attn_triton.launch import Bound, Launchers
from attn_triton.parameters import FORCED
from attn_triton.step import Step

if TYPE_CHECKING:
    from attn_triton.partition import Partition

#: Query rows that one product of the tensor cores has, and the widths of heads whose rows threads read in whole pieces.
ROWS: Final = 16
WIDTHS: Final = (64, 128)

#: Registers of a multiprocessor, and the most that one thread can have.
REGISTERS, MOST_REGISTERS = 65536, 255

#: Positions of the arguments that change from layer to layer: q, k, v, sinks, out, lse.
MOVING: Final = (0, 1, 2, 5, 6, 7)
#: Sinks, out and lse; token and head strides of q and out; scale, cap and the values' scale.
OUTPUTS, STRIDES, SCALES = slice(5, 8), slice(14, 18), slice(20, 23)


def takes(chip: Chip, kind: Kind, step: Step | None) -> bool:
    """Whether the kernel can compute layers of ``kind`` in ``step`` (None: in some step). Where the table has a tile
    for it (`DecodeTile.gluon`) it does; everything else is the plain kernel's.
    """
    g = kind.geometry
    return (
        chip.sm == 90
        and g.fp8_limit > 0
        and g.dtype.itemsize == 2
        and g.aligned
        and not g.values_in_keys
        and g.qk_dim in WIDTHS
        and g.v_dim in WIDTHS
        and g.group <= ROWS
        and (step is None or step.single)
        and bool(FORCED.get("gluon", True))
        and gluon_known()
    )


def bind(
    launchers: Launchers, layer: BoundLayer, partition: Partition, q: Tensor, out: Tensor, lse: Tensor | None
) -> tuple[Bound, int]:
    """What layers of the kind of ``layer`` launch, and the grid; the tensors give the dtypes."""
    from attn_triton.kernels.gluon_decode import gluon_decode_kernel

    kind, geometry, keys = layer.kind, layer.kind.geometry, partition.keys
    cut, plan, none = partition.cut, partition.plan, partition.keys.lengths
    constants: dict[str, Any] = {
        "HKV": geometry.num_kv_heads, "GROUP": geometry.group, "W": cut.tile.warps,
        "N": cut.tile.block_n // cut.tile.warps, "D": geometry.qk_dim, "DV": geometry.v_dim,
        **geometry.pool_constants(), "FIXED": cut.fixed, "WINDOW": kind.window is not None, "HAS_CAP": kind.has_cap,
        "HAS_SINKS": kind.sinks is not None, "HAS_LSE": lse is not None, "HALF": geometry.dtype == torch.bfloat16,
        "E4": geometry.kv_dtype == torch.float8_e4m3fn, "PDL": partition.split,
    }  # fmt: skip
    held = REGISTERS // (cut.tile.per_sm * cut.tile.warps * 32) & ~7
    options: dict[str, Any] = {"num_warps": cut.tile.warps, **({"maxnreg": held} if held < MOST_REGISTERS else {})}
    if partition.split:
        options["launch_pdl"] = True
    dtypes = (out.dtype, kind.sinks, geometry.dtype, geometry.kv_dtype)
    bound = Bound(
        launchers.get(gluon_decode_kernel, constants, options, dtypes),
        [
            q, layer.k_pool, layer.v_pool, keys.pages, keys.lengths,
            none if layer.layer.sinks is None else layer.layer.sinks, out,
            partition.part_lse if lse is None else lse, partition.part_out, partition.part_lse, plan.line, plan.bounds,
            plan.first, cut.splits, 0, 0, 0, 0, keys.pages.stride(0), kind.window or 0, 1.0, 0.0, 1.0,
        ],
        moving=MOVING,
    )  # fmt: skip
    return bound, cut.groups * geometry.num_kv_heads
