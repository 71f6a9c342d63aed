"""Launch parameters: what a step on a known chip gets."""

from __future__ import annotations

import pytest
import torch
from attn_triton.ahead import CHIPS
from attn_triton.chip import Chip
from attn_triton.geometry import Geometry, Strides
from attn_triton.parameters import LOADS, DecodeTile, ExtendTile, decode_tile, extend_tile, shared_bytes
from attn_triton.split import cut_keys

HOPPER = Chip("sm_90", *CHIPS["sm_90"])


def geometry(
    qk: int = 128,
    v: int = 128,
    kv_dtype: torch.dtype = torch.bfloat16,
    heads: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    mla: bool = False,
) -> Geometry:
    strides = Strides(1, 1, 1)
    return Geometry(heads, 4, qk, v, mla, 16, strides, strides, dtype, kv_dtype)


@pytest.mark.parametrize(
    ("lengths", "tile"),
    [
        ([8192], (128, 8, 3, 1)),
        ([4096] * 16, (128, 8, 3, 1)),
        ([65536] * 8, (64, 4, 3, 2)),
        ([4096] * 64, (64, 4, 4, 2)),
        ([1024] * 256, (64, 4, 4, 2)),
        ([128, 32768] * 32, (64, 4, 4, 2)),
    ],
    ids=["one", "few", "few and long", "many", "many and short", "mixed"],
)  # fmt: skip
def test_a_step_gets_what_was_measured_to_be_best(lengths: list[int], tile: tuple[int, ...]) -> None:
    """benchmarks/results/nvidia-h200/triton_attention.json has the times of these and of others."""
    cut = cut_keys(
        lambda load: decode_tile(HOPPER, geometry(), 4, load), HOPPER.multiprocessors, geometry(), batch=len(lengths),
        query_len=1, most_keys=max(lengths), lengths=lengths, window=None,
    )  # fmt: skip
    assert (cut.tile.block_n, cut.tile.warps, cut.tile.stages, cut.tile.per_sm) == tile


@pytest.mark.parametrize(
    ("lengths", "tile"),
    [
        ([8192], (128, 4, 1, True)),
        ([4096] * 16, (128, 4, 1, True)),
        ([65536] * 8, (32, 1, 8, True)),
        ([4096] * 64, (32, 1, 8, True)),
        ([2048] * 128, (32, 1, 8, True)),
        ([128, 32768] * 32, (32, 1, 8, True)),
    ],
    ids=["one", "few", "few and long", "many", "many and short", "mixed"],
)  # fmt: skip
@pytest.mark.parametrize("taken", [True, False], ids=["Gluon's kernel", "the plain one"])
def test_a_step_over_fp8_gets_what_was_measured_to_be_best(
    lengths: list[int], tile: tuple[int, ...], taken: bool
) -> None:
    """Where the kernel in Gluon does not compute a layer, its entries are not looked at."""
    fp8 = geometry(kv_dtype=torch.float8_e4m3fn)
    cut = cut_keys(
        lambda load: decode_tile(HOPPER, fp8, 4, load, gluon=taken), HOPPER.multiprocessors, fp8, batch=len(lengths),
        query_len=1, most_keys=max(lengths), lengths=lengths, window=None,
    )  # fmt: skip
    found = (cut.tile.block_n, cut.tile.warps, cut.tile.per_sm, cut.tile.gluon)
    assert found == (tile if taken else (128, 4, 2, False))


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tree", [False, True])
def test_every_tile_fits_by_its_own_account(arch: str, kv_dtype: torch.dtype, tree: bool) -> None:
    chip = Chip(arch, *CHIPS[arch])
    for width in (32, 64, 80, 128, 192, 256):
        shape = geometry(width, width, kv_dtype)
        tiles: list[DecodeTile | ExtendTile] = [extend_tile(chip, shape, 1024, tree=tree)]
        tiles += [decode_tile(chip, shape, rows, load, tree=tree) for rows in (4, 64) for load in LOADS]
        for tile in tiles:
            small = tile.stages == 1 and tile.block_n <= 16
            assert small or shared_bytes(shape, tile, tree=tree) <= chip.shared_memory, f"{width}: {tile}"


@pytest.mark.parametrize("arch", [arch for arch in CHIPS if arch.startswith("sm")])
@pytest.mark.parametrize(
    ("qk", "v", "mla"), [(64, 64, False), (128, 128, False), (256, 256, False), (80, 256, False), (576, 512, True)]
)
@pytest.mark.parametrize("rows", [4, 32, 64])
def test_products_in_fp32_compile_in_seconds(arch: str, qk: int, v: int, mla: bool, rows: int) -> None:
    """Each multiplication is an instruction: with 4600 of them a thread a kernel took half a minute."""
    chip, shape = Chip(arch, *CHIPS[arch]), geometry(qk, v, torch.float32, dtype=torch.float32, mla=mla)
    tiles: list[DecodeTile | ExtendTile] = [extend_tile(chip, shape, 64)]
    tiles += [decode_tile(chip, shape, rows, load) for load in LOADS]
    for tile in tiles:
        assert tile.block_m * tile.block_n * max(qk, v) <= 1024 * 32 * tile.warps, tile
        assert shared_bytes(shape, tile, tree=False) <= chip.shared_memory
