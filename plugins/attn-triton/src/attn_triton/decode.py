"""Binding the decode kernels: few query rows over a long cache, split over programs and merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, power_of_two_from
from attn_triton.kernels.decode import decode_kernel
from attn_triton.kernels.join import merge_kernel, schedule_kernel
from attn_triton.kinds import BoundLayer, Kind, value_scale
from attn_triton.launch import Bound, Launchers
from attn_triton.parameters import LOADS, decode_tile
from attn_triton.split import Cut, cut_keys
from attn_triton.step import Keys, Step
from attn_triton.workspace import Workspace

# Positions of the arguments that change from layer to layer.
Q, K, V, SINKS, OUT, LSE = 0, 1, 2, 8, 9, 10
Q_TOKEN, Q_HEAD, OUT_TOKEN, OUT_HEAD, SCALE, CAP, V_SCALE = 17, 18, 19, 20, 23, 24, 25
MERGE_OUT, MERGE_LSE, MERGE_OUT_TOKEN, MERGE_OUT_HEAD = 2, 3, 10, 11


@dataclass(slots=True, eq=False)
class Schedule:
    """The line of blocks of a step, cut: line [B + 1], bounds [groups + 1], first [groups], owners [B, 2], all int32."""

    line: Tensor
    bounds: Tensor
    first: Tensor
    owners: Tensor
    refresh: Bound | None = None
    grid: int = 0

    def run(self) -> None:
        """Cut the line anew, from what the lengths are now."""
        if self.refresh is not None:
            self.refresh.launch(self.grid)


@dataclass(slots=True, eq=False)
class BoundDecode:
    """One kind of layers in one step, ready to launch."""

    attend: Bound
    grid: int
    merge: Bound | None
    merge_grid: tuple[int, int]

    def run(self, q: Tensor, out: Tensor, lse: Tensor | None, bound: BoundLayer, scale: tuple[float, float]) -> None:
        """out [T, Hq, Dv] (and lse [T, Hq]) of queries q [T, Hq, Dqk] over the layer's pools."""
        attend, merge, layer = self.attend, self.merge, bound.layer
        attend.put(Q, q)
        attend.put(K, bound.k_pool)
        attend.put(V, bound.v_pool)
        attend.put(OUT, out)
        if lse is not None:
            attend.put(LSE, lse)
        if layer.sinks is not None:
            attend.put(SINKS, layer.sinks)
        q_strides, out_strides = q.stride(), out.stride()
        attend.set(Q_TOKEN, q_strides[0])
        attend.set(Q_HEAD, q_strides[1])
        attend.set(OUT_TOKEN, out_strides[0])
        attend.set(OUT_HEAD, out_strides[1])
        attend.set(SCALE, scale[0])
        attend.set(CAP, scale[1])
        attend.set(V_SCALE, value_scale(layer))
        attend.launch(self.grid)
        if merge is not None:
            merge.put(MERGE_OUT, out)
            if lse is not None:
                merge.put(MERGE_LSE, lse)
            merge.set(MERGE_OUT_TOKEN, out_strides[0])
            merge.set(MERGE_OUT_HEAD, out_strides[1])
            merge.launch(*self.merge_grid)


class DecodeKernels:
    """The decode kernels on one chip."""

    def __init__(self, chip: Chip, launchers: Launchers) -> None:
        self.chip = chip
        self._launchers = launchers

    def bind(
        self, step: Step, layer: BoundLayer, workspace: Workspace, q: Tensor, out: Tensor, lse: Tensor | None
    ) -> BoundDecode:
        """What layers of the kind of ``layer`` launch in ``step``; the tensors give the dtypes."""
        kind = layer.kind
        geometry = kind.geometry
        keys = step.keys(kind.cross)
        cut = self.cut(step, kind, keys)
        flags = {"SINGLE": step.single, "WINDOW": kind.window is not None}
        part_out, part_lse = workspace.parts(part_rows(cut, geometry), sum(geometry.v_parts))
        none = keys.lengths  # stands where a kernel was compiled to look at nothing
        plan = Schedule(none, none, none, none) if cut.fixed else self.schedule(step, kind, keys, cut)
        split = not (cut.fixed and cut.splits == 1)
        shared = {"HKV": geometry.num_kv_heads, "GROUP": geometry.group, "TILES": cut.tiles, "BM": cut.tile.block_m,
                  "BN": cut.tile.block_n, "DV": geometry.v_dim, "FIXED": cut.fixed, "HAS_LSE": lse is not None,
                  "PDL": split and self.chip.dependent_launch, **flags}  # fmt: skip
        options = {"launch_pdl": True} if shared["PDL"] else {}
        dtypes = (out.dtype, kind.sinks)
        attend = Bound(
            self._launchers.get(
                decode_kernel,
                {
                    **geometry.head_constants(), **geometry.pool_constants(), **shared, "STAGES": cut.tile.stages,
                    "CROSS": kind.cross, "TREE": step.tree is not None, "Q_TREE": 1 if step.tree is None else step.tree.shape[-1],
                    "HAS_CAP": kind.has_cap, "HAS_SINKS": kind.sinks is not None,
                },
                {"num_warps": cut.tile.warps, "num_stages": cut.tile.stages, **options},
                (*dtypes, geometry.dtype, geometry.kv_dtype),
            ),
            [
                q, layer.k_pool, layer.v_pool, keys.pages, keys.lengths, step.starts,
                none if step.tree is None else step.tree, none if step.depths is None else step.depths,
                none if layer.layer.sinks is None else layer.layer.sinks, out, part_lse if lse is None else lse,
                part_out, part_lse, plan.line, plan.bounds, plan.first, cut.splits, 0, 0, 0, 0, keys.pages.stride(0),
                kind.window or 0, 1.0, 0.0, 1.0,
            ],
            moving=(Q, K, V, SINKS, OUT, LSE),
        )  # fmt: skip
        grid = cut.groups * cut.tiles * geometry.num_kv_heads
        if not split:
            return BoundDecode(attend, grid, None, (0, 0))
        rows = min(cut.tile.block_m, power_of_two_from(step.max_query_len * geometry.group))
        row_tile, parts = merge_tile(cut, rows, power_of_two_from(sum(geometry.v_parts)))
        width = sum(geometry.v_parts)
        merge = Bound(
            self._launchers.get(
                merge_kernel,
                {**shared, "ROWS": rows, "RT": row_tile, "PARTS": parts, "WIDTH": width, "PADDED": power_of_two_from(width)},
                {"num_warps": 4, **options},
                dtypes,
            ),
            [
                keys.lengths, step.starts, out, part_lse if lse is None else lse, part_out, part_lse, plan.line,
                plan.bounds, plan.owners, cut.splits, 0, 0, kind.window or 0,
            ],
            moving=(MERGE_OUT, MERGE_LSE),
        )  # fmt: skip
        merge_grid = (step.batch_size * geometry.num_kv_heads * cut.tiles, -(-rows // row_tile))
        return BoundDecode(attend, grid, merge, merge_grid)

    def cut(self, step: Step, kind: Kind, keys: Keys) -> Cut:
        """How the keys of ``step`` are cut for layers of ``kind``."""
        return cut_keys(
            self.chip,
            kind.geometry,
            batch=step.batch_size,
            query_len=step.max_query_len,
            most_keys=keys.most,
            lengths=keys.host,
            window=kind.window,
        )

    def prepare(self, step: Step, kind: Kind) -> None:
        """Make the schedule that layers of ``kind`` will need in ``step``, before a capture begins."""
        keys = step.keys(kind.cross)
        cut = self.cut(step, kind, keys)
        if not cut.fixed:
            self.schedule(step, kind, keys, cut)

    def schedule(self, step: Step, kind: Kind, keys: Keys, cut: Cut) -> Schedule:
        """The cut line, made on the device once a step for all kinds of layers that cut alike."""
        key = (kind.cross, kind.window, cut)
        found = step.schedules.get(key)
        if found is None:
            sizes = [step.batch_size + 1, cut.groups + 1, cut.groups, 2 * step.batch_size]
            room = torch.empty(sum(sizes), dtype=torch.int32, device=keys.lengths.device)
            line, bounds, first, owners = torch.split_with_sizes(room, sizes)
            found = step.schedules[key] = Schedule(line, bounds, first, owners)
            launcher = self._launchers.get(
                schedule_kernel,
                {
                    "BATCH": power_of_two_from(max(2, step.batch_size)), "BN": cut.tile.block_n, "SINGLE": step.single,
                    "WINDOW": kind.window is not None,
                },
                {"num_warps": 4},
                (),
            )  # fmt: skip
            args = [
                keys.lengths, step.starts, found.line, found.bounds, found.first, found.owners, step.batch_size,
                cut.groups, cut.stream_groups, cut.splits, kind.window or 0,
            ]  # fmt: skip
            found.refresh, found.grid = Bound(launcher, args), max(cut.groups + 1, step.batch_size)
            found.run()
        return found

    def most_part_elements(self, kind: Kind, query_len: int) -> int:
        """Elements of partial results that steps of ``query_len`` queries a request can need, whatever their batch and
        lengths.
        """
        geometry, rows = kind.geometry, query_len * kind.geometry.group
        tiles = [decode_tile(self.chip, geometry, rows, load) for load in LOADS]
        heads = [geometry.num_kv_heads * -(-rows // tile.block_m) for tile in tiles]
        most = [
            2 * max(self.chip.multiprocessors * tile.per_sm, count) * tile.block_m
            for tile, count in zip(tiles, heads, strict=True)
        ]
        return max(most) * (sum(geometry.v_parts) + 1)


def part_rows(cut: Cut, geometry: Geometry) -> int:
    """Rows of partial results that ``cut`` may write."""
    return cut.slots * cut.tiles * geometry.num_kv_heads * cut.tile.block_m


def merge_tile(cut: Cut, rows: int, width: int) -> tuple[int, int]:
    """Rows and parts that one program of the merge holds at a time: 8 rows of 512 in all, parts before rows.

    One row a program was slow with many rows, and too many leave the chip idle with few.
    """
    budget = max(1, 4096 // width)
    parts = min(16, budget, power_of_two_from(max(2, cut.splits))) if cut.fixed else min(4, budget)
    return max(1, min(rows, budget // parts)), max(1, parts)
