"""How a step's keys are shared out to programs, and how what they found is joined: schedules, partial results, the
merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attn_triton import hopper_decode, hopper_mla
from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, power_of_two_from
from attn_triton.kernels.join import merge_kernel, schedule_kernel
from attn_triton.kinds import Kind
from attn_triton.launch import Bound, Launchers
from attn_triton.parameters import LOADS, DecodeTile, Load, decode_tile
from attn_triton.split import Cut, cut_keys
from attn_triton.step import Keys, Step
from attn_triton.workspace import Workspace

#: Positions of the arguments of the merge that change from layer to layer: out, lse.
MOVING: Final = (2, 3)
OUTPUTS = slice(2, 4)
#: Token and head stride of out.
STRIDES = slice(10, 12)


@dataclass(slots=True, eq=False)
class Schedule:
    """The line of blocks of a step, cut: line [B + 1], bounds [groups + 1], first [groups], owners [B, 2], all
    int32.
    """

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
class Partition:
    """The keys of one kind of layers in one step, cut. ``split``: there may be partial results, which are merged."""

    keys: Keys
    cut: Cut
    plan: Schedule
    part_out: Tensor
    part_lse: Tensor

    @property
    def split(self) -> bool:
        return not (self.cut.fixed and self.cut.splits == 1)


@dataclass(slots=True, eq=False)
class BoundMerge:
    """The merge of one kind of layers in one step, ready to launch."""

    bound: Bound
    grid: tuple[int, int]

    def run(self, out: Tensor, lse: Tensor | None) -> None:
        """Fill the rows of out [T, Hq, Dv] and lse [T, Hq] whose keys were split."""
        bound = self.bound
        values = bound.values
        if bound.interpreted:
            bound.place(out, lse)
        else:
            out_at, lse_at = out.data_ptr(), 0 if lse is None else lse.data_ptr()
            values[OUTPUTS] = (out_at, lse_at)
            bound.aligned = not (out_at | lse_at) & 15
        values[STRIDES] = out.stride()[:2]
        bound.launch(*self.grid)


class Partitions:
    """Cuts the keys of steps on one chip."""

    def __init__(self, chip: Chip, launchers: Launchers) -> None:
        self.chip = chip
        self._launchers = launchers

    def of(self, step: Step, kind: Kind, workspace: Workspace) -> Partition:
        """The keys of layers of ``kind`` in ``step``, cut, with room for partial results in ``workspace``."""
        keys = step.keys(kind.cross)
        cut = self.cut(step, kind, keys)
        none = keys.lengths  # stands where a kernel was compiled to look at nothing
        plan = Schedule(none, none, none, none) if cut.fixed else self.schedule(step, kind, keys, cut)
        part_out, part_lse = workspace.parts(part_rows(cut, kind.geometry), sum(kind.geometry.v_parts))
        return Partition(keys, cut, plan, part_out, part_lse)

    def prepare(self, step: Step, kind: Kind) -> None:
        """Make the schedule that layers of ``kind`` will need in ``step``, before a capture begins."""
        keys = step.keys(kind.cross)
        cut = self.cut(step, kind, keys)
        if not cut.fixed:
            self.schedule(step, kind, keys, cut)

    def cut(self, step: Step, kind: Kind, keys: Keys) -> Cut:
        """How the keys of ``step`` are cut for layers of ``kind``."""
        return cut_keys(
            lambda load: self._tile(step, kind, load),
            self.chip.multiprocessors,
            kind.geometry,
            batch=step.batch_size,
            query_len=step.max_query_len,
            most_keys=keys.most,
            lengths=keys.host,
            window=kind.window,
        )

    def _tile(self, step: Step, kind: Kind, load: Load) -> DecodeTile:
        if hopper_mla.takes(self.chip, kind, step):
            return hopper_mla.TILE
        rows, tree = step.max_query_len * kind.geometry.group, step.tree is not None and not kind.cross
        gluon = hopper_decode.takes(self.chip, kind, step)
        return decode_tile(self.chip, kind.geometry, rows, load, tree=tree, gluon=gluon)

    def schedule(self, step: Step, kind: Kind, keys: Keys, cut: Cut) -> Schedule:
        """The cut line, made on the device once a step for all kinds of layers that cut alike."""
        key = (kind.cross, kind.window, cut)
        found = step.schedules.get(key)
        if found is None:
            sizes = [step.batch_size + 1, cut.groups + 1, cut.groups, 2 * step.batch_size]
            # Each begins at 16 bytes: kernels are compiled for whether addresses do.
            whole = [-(-size // 4) * 4 for size in sizes]
            room = torch.empty(sum(whole), dtype=torch.int32, device=keys.lengths.device)
            parts = torch.split_with_sizes(room, whole)
            line, bounds, first, owners = (part[:size] for part, size in zip(parts, sizes, strict=True))
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
        gluon = query_len == 1 and hopper_decode.takes(self.chip, kind, None)
        tiles = [decode_tile(self.chip, geometry, rows, load, gluon=g) for load in LOADS for g in {gluon, False}]
        if hopper_mla.takes(self.chip, kind, None):
            tiles.append(hopper_mla.TILE)
        programs = [
            max(self.chip.multiprocessors * t.per_sm, geometry.num_kv_heads * -(-rows // t.block_m)) for t in tiles
        ]
        most = max(2 * count * tile.block_m for count, tile in zip(programs, tiles, strict=True))
        return most * (sum(geometry.v_parts) + 1)

    def bind_merge(
        self, step: Step, kind: Kind, partition: Partition, out: Tensor, lse: Tensor | None
    ) -> BoundMerge | None:
        """What joins the parts of layers of ``kind`` in ``step``; None if there are none."""
        if not partition.split:
            return None
        geometry, cut, plan, keys = kind.geometry, partition.cut, partition.plan, partition.keys
        width = sum(geometry.v_parts)
        rows = min(cut.tile.block_m, power_of_two_from(step.max_query_len * geometry.group))
        row_tile, parts = merge_tile(cut, rows, power_of_two_from(width))
        pdl = self.chip.dependent_launch
        constants = {
            "HKV": geometry.num_kv_heads, "GROUP": geometry.group, "TILES": cut.tiles, "BM": cut.tile.block_m,
            "BN": cut.tile.block_n, "ROWS": rows, "RT": row_tile, "PARTS": parts, "DV": geometry.v_dim, "WIDTH": width,
            "PADDED": power_of_two_from(width), "FIXED": cut.fixed, "SINGLE": step.single,
            "WINDOW": kind.window is not None, "HAS_LSE": lse is not None, "PDL": pdl,
        }  # fmt: skip
        options = {"num_warps": 4, **({"launch_pdl": True} if pdl else {})}
        bound = Bound(
            self._launchers.get(merge_kernel, constants, options, (out.dtype,)),
            [
                keys.lengths, step.starts, out, partition.part_lse if lse is None else lse, partition.part_out,
                partition.part_lse, plan.line, plan.bounds, plan.owners, cut.splits, 0, 0, kind.window or 0,
            ],
            moving=MOVING,
        )  # fmt: skip
        return BoundMerge(bound, (step.batch_size * geometry.num_kv_heads * cut.tiles, -(-rows // row_tile)))


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
