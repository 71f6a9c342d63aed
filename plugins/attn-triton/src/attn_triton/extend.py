"""Binding the extend kernel: many query rows, over the cache or over keys that are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from attn_triton import hopper_extend
from attn_triton.chip import Chip
from attn_triton.geometry import power_of_two_from
from attn_triton.kernels.extend import extend_kernel, tile_map_kernel
from attn_triton.kinds import BoundLayer, value_scale
from attn_triton.launch import Bound, Launchers
from attn_triton.parameters import ExtendTile, extend_tile
from attn_triton.step import Step
from attn_triton.strided import Strided

#: Positions of the arguments that change from layer to layer: q, k, v, sinks, out, lse.
MOVING: Final = (0, 1, 2, 10, 11, 12)
#: Token and head strides of q and out; scale, cap and the values' scale.
STRIDES, SCALES = slice(17, 21), slice(23, 26)
#: Row blocks of the tile map that one program writes.
MAP_CHUNK = 16


@dataclass(slots=True, eq=False)
class BoundExtend:
    """One kind of layers in one step, ready to launch."""

    attend: Strided
    grid: int

    def run(self, q: Tensor, out: Tensor, lse: Tensor | None, bound: BoundLayer, scale: tuple[float, float]) -> None:
        """out [T, Hq, Dv] (and lse [T, Hq]) of queries q [T, Hq, Dqk] over the layer's pools."""
        attend, layer = self.attend.of(q, out), bound.layer
        attend.place(q, bound.k_pool, bound.v_pool, layer.sinks, out, lse)
        attend.values[SCALES] = (*scale, value_scale(layer))
        attend.launch(self.grid)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which query rows there are, and over what: starts [B + 1], and the keys' lengths [B] and pages, or key_starts [B
    + 1].
    """

    batch: int
    num_tokens: int
    max_query_len: int
    starts: Tensor
    lengths: Tensor | None
    pages: Tensor | None
    key_starts: Tensor | None
    causal: bool
    tree: Tensor | None = None
    depths: Tensor | None = None
    spans: Tensor | None = None


class ExtendKernels:
    """The extend kernel on one chip."""

    def __init__(self, chip: Chip, launchers: Launchers, *, invariant: bool) -> None:
        self.chip = chip
        self._launchers = launchers
        self._invariant = invariant

    def bind(
        self, step: Step, layer: BoundLayer, q: Tensor, out: Tensor, lse: Tensor | None
    ) -> BoundExtend | hopper_extend.BoundGluonExtend:
        """What layers of the kind of ``layer`` launch in ``step``; the tensors give the dtypes."""
        keys = step.keys(layer.kind.cross)
        cross = layer.kind.cross
        rows = Rows(
            batch=step.batch_size,
            num_tokens=step.num_tokens,
            max_query_len=step.max_query_len,
            starts=step.starts,
            lengths=keys.lengths,
            pages=keys.pages,
            key_starts=None,
            causal=not cross,
            tree=None if cross else step.tree,
            depths=None if cross else step.depths,
            spans=None if cross else step.spans,
        )
        return self.bind_rows(rows, layer, q, out, lse, captured=step.captured)

    def bind_rows(
        self, rows: Rows, layer: BoundLayer, q: Tensor, out: Tensor, lse: Tensor | None, *, captured: bool = False
    ) -> BoundExtend | hopper_extend.BoundGluonExtend:
        """The same over any rows. ``captured``: what the lengths are may not be asked, nor anything be allocated for
        them.
        """
        kind, geometry = layer.kind, layer.kind.geometry
        if not self._invariant and hopper_extend.takes(self.chip, kind, rows):
            blocks, tile_map = self._blocks(rows, hopper_extend.TILE, geometry.group, captured=captured)
            return hopper_extend.bind(self.chip, self._launchers, rows, blocks, tile_map, layer, q, out, lse)
        most_rows = 1 if self._invariant else rows.max_query_len * geometry.group
        tile = extend_tile(self.chip, geometry, most_rows, tree=rows.tree is not None)
        blocks, tile_map = self._blocks(rows, tile, geometry.group, captured=captured)
        none = rows.starts  # stands where the kernel was compiled to look at nothing
        constants = {
            **geometry.head_constants(), **geometry.pool_constants(), "BM": tile.block_m, "BN": tile.block_n,
            "STAGES": tile.stages, "PAGED": rows.pages is not None, "MAPPED": tile_map is not None,
            "BY_HEAD": tile.by_head, "CAUSAL": rows.causal, "TREE": rows.tree is not None,
            "Q_TREE": 1 if rows.tree is None else rows.tree.shape[-1], "HAS_SPANS": rows.spans is not None,
            "WINDOW": kind.window is not None, "HAS_CAP": kind.has_cap, "HAS_SINKS": kind.sinks is not None,
            "HAS_LSE": lse is not None,
        }  # fmt: skip
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        dtypes = (out.dtype, kind.sinks, geometry.dtype, geometry.kv_dtype)
        args = [
            q, layer.k_pool, layer.v_pool, _or(rows.pages, none), _or(rows.lengths, none), rows.starts,
            _or(rows.key_starts, none), _or(rows.spans, none), _or(rows.tree, none), _or(rows.depths, none),
            _or(layer.layer.sinks, none), out, _or(lse, none), _or(tile_map, none), rows.batch, blocks,
            0 if rows.spans is None else rows.spans.shape[1], 0, 0, 0, 0,
            0 if rows.pages is None else rows.pages.stride(0),
            kind.window or 0, 1.0, 0.0, 1.0,
        ]  # fmt: skip

        def attend(unit: int) -> Bound:
            launcher = self._launchers.get(extend_kernel, {**constants, "UNIT": unit}, options, dtypes)
            return Bound(launcher, args, moving=MOVING)

        programs = (blocks if tile_map is not None else blocks * rows.batch) * geometry.num_kv_heads
        return BoundExtend(Strided(attend, STRIDES), programs)

    def _blocks(self, rows: Rows, tile: ExtendTile, group: int, *, captured: bool) -> tuple[int, Tensor | None]:
        """Row blocks of each request, or, where requests differ too much, of all of them with a map of which is
        whose.
        """
        each = -(-rows.max_query_len * group // tile.block_m)
        exact = rows.num_tokens * group // tile.block_m + rows.batch
        if captured or each * rows.batch <= exact:
            return each, None
        entries = -(-exact // MAP_CHUNK) * MAP_CHUNK
        tile_map = torch.empty(entries, 2, dtype=torch.int32, device=rows.starts.device)
        constants: dict[str, Any] = {
            "BATCH": power_of_two_from(max(2, rows.batch)),
            "GROUP": group,
            "BM": tile.block_m,
            "CHUNK": MAP_CHUNK,
        }
        launcher = self._launchers.get(tile_map_kernel, constants, {"num_warps": 4}, ())
        launcher((entries // MAP_CHUNK, 1), [rows.starts, tile_map, rows.batch, entries])
        return entries, tile_map


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else tensor
