"""Storing new keys and values in the cache: one launch for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attn_core.errors import BatchError
from torch import Tensor

from attn_triton.geometry import Geometry, power_of_two_from
from attn_triton.kernels.write import write_kernel
from attn_triton.kinds import BoundLayer
from attn_triton.launch import Bound, Launchers

#: Positions of the arguments that change from layer to layer: k, v and their pools.
MOVING: Final = (0, 1, 3, 4)
#: Scales, and token and head strides of k and v.
NUMBERS = slice(6, 12)
#: Token and head strides of k, then of v.
RowStrides = tuple[int, int, int, int]
#: Elements of keys that one program stores.
PROGRAM_ELEMENTS = 2048


@dataclass(slots=True, eq=False)
class BoundWrite:
    """The write of layers of one geometry to the same slots, ready to launch."""

    bound: Bound
    grid: int

    def run(self, k: Tensor, v: Tensor | None, layer: BoundLayer, strides: RowStrides) -> None:
        """Store k [T, Hkv, Dk] and v [T, Hkv, Dv] (None for MLA) at the slots this was bound to."""
        bound = self.bound
        bound.place(k, k if v is None else v, layer.k_pool, layer.v_pool)
        bound.values[NUMBERS] = (float(layer.layer.k_scale), float(layer.layer.v_scale), *strides)
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
        "LIMIT": geometry.fp8_limit, "ALIGNED": aligned(row_strides(k, v)), "PDL": launchers.dependent,
    }  # fmt: skip
    values = k if v is None else v
    launcher = launchers.get(write_kernel, constants, {"num_warps": 4}, (k.dtype, values.dtype, geometry.kv_dtype))
    args = [k, values, slots, layer.k_pool, layer.v_pool, slots.shape[0], 1.0, 1.0, 0, 0, 0, 0]
    return BoundWrite(Bound(launcher, args, moving=MOVING), -(-slots.shape[0] // tokens))


def row_strides(k: Tensor, v: Tensor | None) -> RowStrides:
    """Token and head strides of k and v; without v those of k again."""
    k_token, k_head = k.stride()[:2]
    if v is None:
        return k_token, k_head, k_token, k_head
    v_token, v_head = v.stride()[:2]
    return k_token, k_head, v_token, v_head


def aligned(strides: RowStrides) -> bool:
    """Whether rows can be read in wide pieces: all strides are multiples of 16 elements."""
    return not (strides[0] | strides[1] | strides[2] | strides[3]) & 15


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
