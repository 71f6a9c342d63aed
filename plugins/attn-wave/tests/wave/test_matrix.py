"""Matrix instructions multiply, with rows and columns in the lanes that the manual's section 7 gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .waves import f32, held, run


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers: products and sums of them are exact in every type."""
    drawn = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype)


def words(values: torch.Tensor) -> Any:
    """[64, n] of a 16-bit type as the registers of each lane, [n / 2, 64] uint32."""
    return values.contiguous().view(torch.int16).numpy().view(np.uint16).view(np.uint32).T


SHAPES = [
    ("v_mfma_f32_16x16x16_f16", 16, 16, torch.float16),
    ("v_mfma_f32_16x16x16_bf16", 16, 16, torch.bfloat16),
    ("v_mfma_f32_32x32x8_f16", 32, 8, torch.float16),
    ("v_mfma_f32_32x32x8_bf16", 32, 8, torch.bfloat16),
]


@pytest.mark.parametrize(("name", "side", "depth", "dtype"), SHAPES, ids=[shape[0] for shape in SHAPES])
@pytest.mark.parametrize("addend", ["zero", "registers", "in place"])
def test_a_product_and_its_addend(name: str, side: int, depth: int, dtype: torch.dtype, addend: str) -> None:
    a, b = numbers(side, depth, dtype, 1), numbers(depth, side, dtype, 2)
    lane = torch.arange(64)
    row, first = lane % side, lane // side * 4
    left = torch.stack([a[row, first + i] for i in range(4)], 1)
    right = torch.stack([b[first + i, row] for i in range(4)], 1)
    count = side * side // 64
    registers: dict[str, Any] = {f"v{i}": words(left)[i] for i in range(2)}
    registers |= {f"v{2 + i}": words(right)[i] for i in range(2)}
    registers |= {f"v{8 + i}": f32(*[100.0 * i + n for n in range(64)]) for i in range(count)}
    third = "0" if addend == "zero" else f"v[8:{7 + count}]"
    into = 32 if addend == "registers" else 8
    wave = run(f"{name} v[{into}:{into + count - 1}], v[0:1], v[2:3], {third}", {**registers, "exec": 1})
    product = a.double() @ b.double()
    for i in range(count):
        # four rows at a time, the groups of lanes one after the other
        out_row = lane // side * 4 + i % 4 + i // 4 * (4 * 64 // side)
        more = torch.zeros(64) if third == "0" else 100.0 * i + lane
        np.testing.assert_array_equal(
            held(wave, f"v{into + i}").view(np.float32), (product[out_row, row] + more).float().numpy()
        )


def test_sums_are_of_fp32() -> None:
    """A product that fp16 has no room for."""
    registers = {f"v{i}": 0x78007800 for i in range(4)}
    wave = run("v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0", registers)
    assert held(wave, "v4").view(np.float32)[0] == np.float32(16 * 32768.0**2)


def test_accumulation_registers_are_operands_like_others() -> None:
    registers = {"v0": 0x3C003C00, "v1": 0x3C003C00, "a6": 0x40004000, "a7": 0x40004000}
    wave = run("v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], a[6:7], 0", registers)
    assert held(wave, "a3").view(np.float32)[0] == 32.0
