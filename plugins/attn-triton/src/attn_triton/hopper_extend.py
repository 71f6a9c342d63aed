"""Binding the Gluon kernel of extend: where it is taken, and how it sees the pools."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, Strides
from attn_triton.hopper_mla import box_layout, gluon_known
from attn_triton.kinds import BoundLayer, Kind, value_scale
from attn_triton.launch import Bound, Launchers
from attn_triton.parameters import FORCED, ExtendTile
from attn_triton.strided import Strided

if TYPE_CHECKING:
    from attn_triton.extend import Rows

#: What the kernel is written for: 128 rows in two groups of four warps, 128 keys, two stages.
WARPS: Final = 4
TILE: Final = ExtendTile(block_m=128, block_n=128, warps=8, stages=2, by_head=True)
HEAD_WIDTH: Final = 128
#: KV heads whose row blocks take turns.
NEAR: Final = 4

#: Positions of the arguments that change from layer to layer: q, out, lse.
MOVING: Final = (0, 6, 7)
#: The descriptors of the pools; token and head strides of q and out; scale and the values' scale.
POOLS, STRIDES, SCALES = slice(1, 3), slice(11, 15), slice(16, 18)


@dataclass(frozen=True, slots=True)
class Place:
    """A pool as rows: token t of page p for head h is row p * page + h * head + t, from column h * column on."""

    page: int
    head: int
    column: int
    width: int


def takes(chip: Chip, kind: Kind, rows: Rows) -> bool:
    """Whether the kernel computes layers of ``kind`` over ``rows``. Everything else is the plain kernel's."""
    g = kind.geometry
    fits = (
        not g.values_in_keys
        and (g.qk_dim, g.v_dim) == (HEAD_WIDTH, HEAD_WIDTH)
        and g.dtype in (torch.bfloat16, torch.float16)
        and g.kv_dtype == g.dtype
        and g.page_size % 16 == 0
        and rows.pages is not None
        and place_of(g, g.k) is not None
        and g.k == g.v
    )
    plain = kind.window is None and not kind.has_cap and kind.sinks is None
    simple = rows.causal and rows.tree is None and rows.spans is None
    return fits and plain and simple and chip.sm == 90 and FORCED.get("gluon", True) and gluon_known()


def place_of(geometry: Geometry, strides: Strides) -> Place | None:
    """How a pool of these strides is rows of the copy engine; None if its tokens do not lie in even rows."""
    page, heads, width = geometry.page_size, geometry.num_kv_heads, HEAD_WIDTH
    if strides == Strides(page * heads * width, heads * width, width):  # NHD
        return Place(page, 0, width, heads * width)
    if strides == Strides(heads * page * width, width, page * width):  # HND
        return Place(heads * page, page, 0, width)
    return None


@dataclass(slots=True, eq=False)
class BoundGluonExtend:
    """The kernel for one kind of layers in one step, ready to launch."""

    attend: Strided
    grid: int
    place: Place
    box: int
    pools: dict[int, tuple[Any, Any]]

    def run(self, q: Tensor, out: Tensor, lse: Tensor | None, bound: BoundLayer, scale: tuple[float, float]) -> None:
        """out [T, Hq, 128] (and lse [T, Hq]) of queries q [T, Hq, 128] over the layer's pools."""
        attend, layer = self.attend.of(q, out), bound.layer
        pools = self.pools.get(layer.layer_id)
        if pools is None:
            pools = (boxes(bound.k_pool, self.place, self.box), boxes(bound.v_pool, self.place, self.box))
            self.pools[layer.layer_id] = pools
        attend.place(q, out, lse)
        attend.values[POOLS] = pools
        attend.values[SCALES] = (scale[0], value_scale(layer))
        attend.launch(self.grid)


def bind(
    chip: Chip,
    launchers: Launchers,
    rows: Rows,
    blocks: int,
    tile_map: Tensor | None,
    layer: BoundLayer,
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
) -> BoundGluonExtend:
    """What layers of the kind of ``layer`` launch over ``rows``; the tensors give the dtypes."""
    from attn_triton.kernels.gluon_extend import gluon_extend_kernel

    geometry = layer.kind.geometry
    place = place_of(geometry, geometry.k)
    assert place is not None, "takes() was asked"
    assert rows.pages is not None, "takes() was asked"
    assert rows.lengths is not None, "paged keys have lengths"
    box = math.gcd(geometry.page_size, TILE.block_n)
    items = (blocks if tile_map is not None else blocks * rows.batch) * geometry.num_kv_heads
    constants = {
        "HKV": geometry.num_kv_heads, "GROUP": geometry.group, "BM": TILE.block_m, "BN": TILE.block_n,
        "STAGES": TILE.stages, "PAGE": geometry.page_size, "BOX": box, "ROWS_PAGE": place.page,
        "ROWS_HEAD": place.head, "COLUMNS_HEAD": place.column, "MAPPED": tile_map is not None,
        "NEAR": near_heads(geometry.num_kv_heads), "HAS_LSE": lse is not None,
    }  # fmt: skip
    args = [
        q, boxes(layer.k_pool, place, box), boxes(layer.v_pool, place, box), rows.pages, rows.lengths, rows.starts,
        out, rows.starts if lse is None else lse, rows.starts if tile_map is None else tile_map, rows.batch, blocks,
        0, 0, 0, 0, rows.pages.stride(0), 1.0, 1.0,
    ]  # fmt: skip

    def attend(unit: int) -> Bound:
        sized = {**constants, "UNIT": unit}
        dtypes = (out.dtype, geometry.dtype)
        return Bound(launchers.get(gluon_extend_kernel, sized, {"num_warps": WARPS}, dtypes), args, moving=MOVING)

    return BoundGluonExtend(Strided(attend, STRIDES), items, place, box, {})


def near_heads(heads: int) -> int:
    """How many KV heads take turns in the order of row blocks: a divisor of ``heads``, at most NEAR."""
    return math.gcd(heads, int(FORCED.get("near", NEAR)))


def boxes(pool: Tensor, place: Place, box: int) -> Any:
    """The descriptor of a pool, seen as rows, in boxes of [box, 64]."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape = [pool.shape[0] * place.page, place.width]
    flat = pool.as_strided(shape, (place.width, 1))
    return TensorDescriptor(flat, shape, [place.width, 1], [box, 64], box_layout())
