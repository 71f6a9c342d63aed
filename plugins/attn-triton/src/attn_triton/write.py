"""Storing new keys and values in the cache: one launch for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from attn_core.errors import BatchError
from torch import Tensor

from attn_triton.geometry import Geometry, power_of_two_from
from attn_triton.kernels.write import write_kernel
from attn_triton.kinds import BoundLayer
from attn_triton.launch import Bound, Launchers

#: Positions of the arguments that change from layer to layer: k, v and their pools.
MOVING: Final = (0, 1, 3, 4)
ROWS, POOLS = slice(0, 2), slice(3, 5)
#: Scales, and token and head strides of k and v.
NUMBERS = slice(6, 12)
#: Elements of keys that one program stores.
PROGRAM_ELEMENTS = 2048


@dataclass(slots=True, eq=False)
class BoundWrite:
    """The write of layers of one geometry to the same slots, ready to launch: compiled for rows that can be read in
    wide pieces, since all strides are multiples of 16 elements, or for others.
    """

    make: Callable[[bool], Bound]
    grid: int
    made: dict[bool, Bound] = field(default_factory=dict)

    def run(self, k: Tensor, v: Tensor | None, layer: BoundLayer) -> None:
        """Store k [T, Hkv, Dk] and v [T, Hkv, Dv] (None for MLA) at the slots this was bound to."""
        if v is None:
            v = k
        k_token, k_head, _ = k.stride()
        v_token, v_head, _ = v.stride()
        wide = not (k_token | k_head | v_token | v_head) & 15
        bound = self.made.get(wide)
        if bound is None:
            bound = self.made[wide] = self.make(wide)
        values, scales = bound.values, layer.layer
        if bound.interpreted:
            bound.place(k, v, layer.k_pool, layer.v_pool)
        else:
            k_at, v_at = k.data_ptr(), v.data_ptr()
            k_pool, v_pool = values[POOLS] = layer.pools
            values[ROWS] = (k_at, v_at)
            bound.aligned = not (k_at | v_at | k_pool | v_pool) & 15
        values[NUMBERS] = (float(scales.k_scale), float(scales.v_scale), k_token, k_head, v_token, v_head)
        bound.launch(self.grid)


def bind_write(launchers: Launchers, layer: BoundLayer, k: Tensor, v: Tensor | None, slots: Tensor) -> BoundWrite:
    """The write of layers like ``layer`` to ``slots`` [T] int64; k and v give the dtypes."""
    geometry = layer.kind.geometry
    heads = power_of_two_from(geometry.num_kv_heads)
    padded, v_padded = power_of_two_from(geometry.qk_dim), power_of_two_from(geometry.v_dim)
    tokens = max(1, min(16, PROGRAM_ELEMENTS // (heads * padded)))
    constants = {
        **geometry.pool_constants(), "TOKENS": tokens, "HKV": geometry.num_kv_heads, "HEADS": heads,
        "D": geometry.qk_dim, "D_PADDED": padded, "DV": geometry.v_dim, "V_PADDED": v_padded, "HAS_V": v is not None,
        "LIMIT": geometry.fp8_limit, "PDL": launchers.dependent,
    }  # fmt: skip
    values = k if v is None else v
    args = [k, values, slots, layer.k_pool, layer.v_pool, slots.shape[0], 1.0, 1.0, 0, 0, 0, 0]

    def make(wide: bool) -> Bound:
        dtypes = (k.dtype, values.dtype, geometry.kv_dtype)
        launcher = launchers.get(write_kernel, {**constants, "ALIGNED": wide}, {"num_warps": 4}, dtypes)
        return Bound(launcher, args, moving=MOVING)

    return BoundWrite(make, -(-slots.shape[0] // tokens))


def check_rows(k: Tensor, v: Tensor | None, geometry: Geometry, slots: Tensor) -> None:
    """Raise BatchError unless k and v are rows that the slots can take."""
    heads, count = geometry.num_kv_heads, slots.shape[0]
    wanted_v = None if geometry.values_in_keys else (count, heads, geometry.v_dim)
    given_v = None if v is None else tuple(v.shape)
    fits = tuple(k.shape) == (count, heads, geometry.qk_dim) and (given_v == wanted_v or wanted_v is None)
    if not fits or k.stride(-1) != 1 or (v is not None and v.stride(-1) != 1):
        raise BatchError(
            f"k {tuple(k.shape)} and v {given_v} for {count} slots",
            accepted=f"{(count, heads, geometry.qk_dim)} and {wanted_v}, the last dimension contiguous",
        )
