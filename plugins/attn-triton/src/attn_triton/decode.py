"""Binding the decode kernels: few query rows over a long cache, split over programs and merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from attn_triton import hopper_decode, hopper_mla
from attn_triton.chip import Chip
from attn_triton.kernels.decode import decode_kernel
from attn_triton.kinds import BoundLayer, value_scale
from attn_triton.launch import Bound, Launchers
from attn_triton.partition import BoundMerge, Partition, Partitions
from attn_triton.step import Step
from attn_triton.workspace import Workspace

#: Positions of the arguments that change from layer to layer: q, k, v, sinks, out, lse.
MOVING: Final = (0, 1, 2, 8, 9, 10)
#: Sinks, out and lse; token and head strides of q and out; scale, cap and the values' scale.
OUTPUTS, STRIDES, SCALES = slice(8, 11), slice(17, 21), slice(23, 26)


@dataclass(slots=True, eq=False)
class BoundAttend:
    """A kernel over keys and values for one kind of layers in one step, ready to launch. Its arguments begin with q, k
    and v; ``outputs``, ``strides`` and ``scales``: where they have sinks, out and lse; the token and head strides of q
    and out; scale, cap and the values' scale.
    """

    attend: Bound
    grid: int
    outputs: slice
    strides: slice
    scales: slice

    def run(self, q: Tensor, out: Tensor, lse: Tensor | None, bound: BoundLayer, scale: tuple[float, float]) -> None:
        """Whole rows into out and lse, parts into the workspace."""
        attend, layer = self.attend, bound.layer
        values, sinks = attend.values, layer.sinks
        if attend.interpreted:
            attend.place(q, bound.k_pool, bound.v_pool, sinks, out, lse)
        else:
            k_at, v_at = bound.pools
            q_at, out_at = q.data_ptr(), out.data_ptr()
            sinks_at = 0 if sinks is None else sinks.data_ptr()
            lse_at = 0 if lse is None else lse.data_ptr()
            values[:3] = (q_at, k_at, v_at)
            values[self.outputs] = (sinks_at, out_at, lse_at)
            attend.aligned = not (q_at | k_at | v_at | sinks_at | out_at | lse_at) & 15
        q_token, q_head, _ = q.stride()
        out_token, out_head, _ = out.stride()
        values[self.strides] = (q_token, q_head, out_token, out_head)
        values[self.scales] = (*scale, value_scale(layer))
        attend.launch(self.grid)


@dataclass(slots=True, eq=False)
class BoundDecode:
    """One kind of layers in one step: attention, and the merge of what was split."""

    attend: BoundAttend | hopper_mla.BoundMla
    merge: BoundMerge | None

    def run(self, q: Tensor, out: Tensor, lse: Tensor | None, bound: BoundLayer, scale: tuple[float, float]) -> None:
        """out [T, Hq, Dv] (and lse [T, Hq]) of queries q [T, Hq, Dqk] over the layer's pools."""
        self.attend.run(q, out, lse, bound, scale)
        if self.merge is not None:
            self.merge.run(out, lse)


class DecodeKernels:
    """The decode kernels on one chip."""

    def __init__(self, chip: Chip, launchers: Launchers) -> None:
        self.partitions = Partitions(chip, launchers)
        self._chip = chip
        self._launchers = launchers

    def bind(
        self, step: Step, layer: BoundLayer, workspace: Workspace, q: Tensor, out: Tensor, lse: Tensor | None
    ) -> BoundDecode:
        """What layers of the kind of ``layer`` launch in ``step``; the tensors give the dtypes."""
        partition = self.partitions.of(step, layer.kind, workspace)
        merge = self.partitions.bind_merge(step, layer.kind, partition, out, lse)
        if hopper_mla.takes(self._chip, layer.kind, step):
            return BoundDecode(hopper_mla.bind(self._launchers, step, layer, partition, q, out, lse), merge)
        if partition.cut.tile.gluon:
            attend, grid = hopper_decode.bind(self._launchers, layer, partition, q, out, lse)
            places = (hopper_decode.OUTPUTS, hopper_decode.STRIDES, hopper_decode.SCALES)
            return BoundDecode(BoundAttend(attend, grid, *places), merge)
        return BoundDecode(self._plain(step, layer, partition, q, out, lse), merge)

    def _plain(
        self, step: Step, layer: BoundLayer, partition: Partition, q: Tensor, out: Tensor, lse: Tensor | None
    ) -> BoundAttend:
        kind, geometry, keys = layer.kind, layer.kind.geometry, partition.keys
        cut, plan, none = partition.cut, partition.plan, partition.keys.lengths
        tree = None if kind.cross else step.tree
        pdl = partition.split and self._chip.dependent_launch
        constants = {
            **geometry.head_constants(), **geometry.pool_constants(), "TILES": cut.tiles, "BM": cut.tile.block_m,
            "BN": cut.tile.block_n, "STAGES": cut.tile.stages, "FIXED": cut.fixed, "SINGLE": step.single,
            "CROSS": kind.cross, "TREE": tree is not None, "Q_TREE": 1 if tree is None else tree.shape[-1],
            "WINDOW": kind.window is not None,
            "HAS_CAP": kind.has_cap, "HAS_SINKS": kind.sinks is not None, "HAS_LSE": lse is not None, "PDL": pdl,
            # Triton 3.6 cannot pipeline the assembly for sm_100 and later: there it is a plain conversion.
            "WIDEN": 89 <= self._chip.sm < 100 and geometry.fp8_limit > 0 and geometry.dtype.itemsize == 2,
        }  # fmt: skip
        options = {"num_warps": cut.tile.warps, "num_stages": cut.tile.stages, **({"launch_pdl": True} if pdl else {})}
        dtypes = (out.dtype, kind.sinks, geometry.dtype, geometry.kv_dtype)
        attend = Bound(
            self._launchers.get(decode_kernel, constants, options, dtypes),
            [
                q, layer.k_pool, layer.v_pool, keys.pages, keys.lengths, step.starts,
                none if tree is None else tree, none if tree is None or step.depths is None else step.depths,
                none if layer.layer.sinks is None else layer.layer.sinks, out,
                partition.part_lse if lse is None else lse, partition.part_out, partition.part_lse, plan.line,
                plan.bounds, plan.first, cut.splits, 0, 0, 0, 0, keys.pages.stride(0), kind.window or 0, 1.0, 0.0, 1.0,
            ],
            moving=MOVING,
        )  # fmt: skip
        return BoundAttend(attend, cut.groups * cut.tiles * geometry.num_kv_heads, OUTPUTS, STRIDES, SCALES)
