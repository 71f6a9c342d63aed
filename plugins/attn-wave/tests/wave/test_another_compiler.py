"""Code that another compiler made, Triton, computes attention in the emulator: other instructions, other layouts.

The code object is of `triton_kernels/attention.py`; its products are 32x32x8, its LDS is asked for by the launch.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.faults import EmulationError, MemoryFaultError
from attn_wave.emulator.launch import Pointer, launch
from attn_wave.emulator.listing import parsed, unpacked

from .artefacts import all_instructions
from .programs import changed, with_instructions

FOLDER = Path(__file__).parent.parent / "triton_kernels"
WIDTH, ROWS, LDS = 64, 64, 8192


def kernel() -> CodeObject:
    blob = lzma.decompress((FOLDER / "attention.hsaco.xz").read_bytes())
    listing = unpacked((FOLDER / "attention.listing.xz").read_bytes())[sha256(blob).hexdigest()]
    return with_instructions(CodeObject.parse(blob), tuple(parsed(listing)))


def attended(code: CodeObject, queries: int, keys: int, lds: int = LDS) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``code`` makes of random tensors, and what fp64 does."""
    drawn = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(n, WIDTH, generator=drawn).half() for n in (queries, keys, keys))
    out = torch.full((queries, WIDTH), float("nan"))
    given = [Pointer(q, "q"), Pointer(k, "k"), Pointer(v, "v"), Pointer(out, "out", writable=True)]
    launch(
        code, (-(-queries // ROWS), 1, 1), (256, 1, 1), [*given, queries, keys, 0.125, None, None], wide=False,
        dynamic_lds=lds,
    )  # fmt: skip
    scores = q.double() @ k.double().T * 0.125
    future = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
    return out, scores.masked_fill(future, float("-inf")).softmax(-1) @ v.double()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 100), (64, 64), (70, 133)])
def test_it_computes_attention(queries: int, keys: int) -> None:
    out, exact = attended(kernel(), queries, keys)
    assert (out.double() - exact).abs().max() < 1e-3


def test_it_is_other_code_than_waves() -> None:
    """Else it would prove nothing that the other tests do not."""
    names = {instruction.base for instruction in kernel().instructions}
    assert len(names - {instruction.base for instruction in all_instructions()}) >= 10


def test_less_lds_than_it_needs_is_a_fault() -> None:
    with pytest.raises(MemoryFaultError, match="LDS bytes"):
        attended(kernel(), 64, 64, lds=1024)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("v_exp_f32", "v_log_f32") if text.startswith("v_exp_f32") else None,
        lambda text: text + " offset:8" if text.startswith("ds_write_b64") and "offset" not in text else None,
        lambda text: text.replace("v_mfma_f32_32x32x8_f16", "v_mfma_f32_32x32x8_bf16_1k") if "v_mfma" in text else None,
    ],
    ids=["another function", "LDS written elsewhere", "numbers of another type"],
)
def test_a_fault_in_it_is_noticed(change: Callable[[str], str | None]) -> None:
    try:
        out, exact = attended(changed(kernel(), change), 64, 64)
    except EmulationError:
        return
    assert not (out.double() - exact).abs().max() < 1e-3
