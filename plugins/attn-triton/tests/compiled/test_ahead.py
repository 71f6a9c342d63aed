"""Every kernel compiles for every chip that the manifest names, and fits into its shared memory."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, Final

import pytest
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_triton.ahead import CHIPS, AheadLaunchers, Compiled, compile_config
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.launch import Launcher
from attn_triton.warm import warm_layer
from chosen_steps import STEPS, ChosenStep, play

#: What asks for the most shared memory: many rows, wide heads, a tree's bits.
HARD: Final = {
    "a tree of many rows": ChosenStep(
        "tree_depth decode", (4,), (30,), ForwardMode.TARGET_VERIFY, heads=(16, 1), tree=True
    ),
    "a tree over wide heads": ChosenStep(
        "tree_depth decode", (4,), (30,), ForwardMode.TARGET_VERIFY, heads=(16, 1), widths=(256, 256), tree=True
    ),
    "a tree in one way for all batches": ChosenStep(
        "tree_depth extend", (4,), (30,), ForwardMode.TARGET_VERIFY, heads=(16, 1), tree=True, invariant=True
    ),
    "wide heads": ChosenStep("extend", (70,), (30,), widths=(256, 256), kind={"sliding_window": 20}),
    "fp32": ChosenStep("extend", (70,), (30,), dtype="float32", kind={"softcap": 20.0}),
    "MLA in one way for all batches": ChosenStep(
        "extend",
        (1,),
        (30,),
        ForwardMode.DECODE,
        heads=(16, 1),
        widths=(576, 512),
        page=64,
        layout="MLA",
        invariant=True,
    ),
}


def _claimed(arch: str, step: ChosenStep) -> bool:
    """What the manifest says of fp8 and fp32."""
    if arch.startswith("gfx"):
        return step.kv_dtype == "auto" and step.dtype != "float32"
    return step.kv_dtype == "auto" or arch != "sm_80"


ALL: Final = {**STEPS, **HARD}
CASES: Final = [(arch, name) for arch in CHIPS for name, step in ALL.items() if _claimed(arch, step)]


@pytest.mark.parametrize(("arch", "name"), CASES, ids=[f"{arch}-{name}" for arch, name in CASES])
def test_a_step_compiles(arch: str, name: str) -> None:
    launchers = AheadLaunchers(Chip(arch, *CHIPS[arch]))
    play(ALL[name], "cpu", partial(TritonBackend, chip=launchers.chip, launchers=launchers))
    assert {found.kernel for found in launchers.compiled} >= {"write_kernel"}
    assert all(found.shared <= launchers.chip.shared_memory for found in launchers.compiled)


@pytest.fixture
def only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are asked for and not compiled."""

    def asked(chip: Chip, launcher: Launcher, args: Any, odd: frozenset[int]) -> Compiled:
        return Compiled(launcher.name, launcher.options.get("num_warps", 4), 0, 0, launcher.constants)

    monkeypatch.setattr("attn_triton.ahead.compile_for", asked)


@pytest.mark.usefixtures("only_asked")
def test_warming_up_compiles_what_a_config_needs() -> None:
    """Decode, prompts of one length and of many, and verify of a tree, all there is of kernels without an encoder."""
    config = AttentionConfig.preset("llama-3.1-8b", page_size=16).replace(
        kv_layout="NHD", speculative_num_draft_tokens=4, speculative_eagle_topk=2
    )
    kernels = {found.kernel for found in compile_config(config, "sm_90")}
    assert kernels == {
        "write_kernel", "decode_kernel", "merge_kernel", "schedule_kernel", "tree_depth_kernel", "tile_map_kernel",
        "gluon_extend_kernel",
    }  # fmt: skip


@pytest.mark.usefixtures("only_asked")
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("preset", ["llama-3.1-8b", "gpt-oss-120b", "deepseek-v3"])
def test_after_warming_up_no_decode_step_compiles(preset: str, kv_dtype: str) -> None:
    """However many requests of whatever lengths, known to the host or not."""
    config = AttentionConfig.preset(preset, page_size=64).replace(kv_cache_dtype=kv_dtype)
    config = config.replace(kv_layout="MLA" if config.layers[0].kind == "mla" else "NHD")
    launchers = AheadLaunchers(Chip("sm_90", *CHIPS["sm_90"]))
    backend = TritonBackend(config, KVCache.allocate(config, num_pages=2), chip=launchers.chip, launchers=launchers)
    backend.warmup(config)
    warm = len(launchers.compiled)
    draw = random.Random(7)
    for _ in range(100):
        size, longest = draw.randint(1, 256), draw.choice((16, 300, 2000, 8192, 40000, 131072))
        lengths = [longest] * size if draw.random() < 0.5 else [draw.randint(1, longest) for _ in range(size)]
        batch = ForwardBatch.build(
            ForwardMode.DECODE, query_lens=(1,) * size, seq_lens=lengths, pages=[[0] * -(-n // 64) for n in lengths],
            page_size=64,
            write=(False,) * size,
        )  # fmt: skip
        if draw.random() < 0.3:
            batch.seq_lens_cpu = None
        backend.init_forward_metadata(batch)
        for kind in config.layers:
            warm_layer(backend, config, kind, batch)
        assert launchers.compiled[warm:] == [], f"{size} requests of up to {longest} keys"
