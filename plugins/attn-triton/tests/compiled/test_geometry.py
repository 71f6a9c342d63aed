"""Head sizes as powers of two that tensor cores take."""

from __future__ import annotations

import pytest
import torch
from attn_triton.geometry import Geometry, Strides, split_width


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (16, (16, 0)), (32, (32, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (64, 64)),
        (120, (128, 0)), (128, (128, 0)), (192, (128, 64)), (200, (128, 128)), (256, (256, 0)), (576, (512, 64)),
    ],
)  # fmt: skip
def test_a_width_is_held_by_one_or_two_powers_of_two(width: int, parts: tuple[int, int]) -> None:
    found = split_width(width)
    assert sum(found) >= width
    assert found == parts if width not in (112, 200) else found == (parts[0] + parts[1], 0)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("qk", range(32, 257, 8))
def test_tiles_widened_from_fp8_have_one_swizzle(qk: int, kv_dtype: torch.dtype) -> None:
    """ptxas 12.8 gets the descriptors of two swizzles over one place in shared memory wrong."""
    for v in (32, 40, 64, 80, 96, 128, 192, 256):
        strides = Strides(1, 1, 1)
        geometry = Geometry(2, 4, qk, v, False, 16, strides, strides, torch.bfloat16, kv_dtype)
        parts = [*geometry.k_parts, *geometry.v_parts]
        assert all(part == 0 or part * geometry.dtype.itemsize >= 128 for part in parts), f"{qk} and {v}: {parts}"
        assert sum(geometry.k_parts) >= qk
        assert sum(geometry.v_parts) >= v
