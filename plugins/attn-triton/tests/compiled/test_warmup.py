"""After a warm-up nothing is compiled any more: however many requests, of whatever lengths, in whatever step."""

from __future__ import annotations

import random
from typing import Any

import pytest
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_triton.ahead import CHIPS, AheadLaunchers, Compiled, compile_config
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.launch import Launcher
from attn_triton.warm import warm_layer

PAGE = 64
_EXTEND, _MIXED, _DECODE = ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE


@pytest.fixture(autouse=True)
def only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are asked for and not compiled."""

    def asked(chip: Chip, launcher: Launcher, args: Any, odd: frozenset[int]) -> Compiled:
        return Compiled(launcher.name, launcher.options.get("num_warps", 4), 0, 0, launcher.constants)

    monkeypatch.setattr("attn_triton.ahead.compile_for", asked)


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


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("preset", ["llama-3.1-8b", "gpt-oss-120b", "deepseek-v3"])
def test_no_decode_step_compiles(preset: str, kv_dtype: str) -> None:
    backend, launchers = _warm(preset, kv_cache_dtype=kv_dtype)
    draw = random.Random(7)
    for _ in range(100):
        size, longest = draw.randint(1, 256), draw.choice((16, 300, 2000, 8192, 40000, 131072))
        lengths = [longest] * size if draw.random() < 0.5 else [draw.randint(1, longest) for _ in range(size)]
        _take(backend, launchers, _batch(_DECODE, [1] * size, lengths, known=draw.random() < 0.7))


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("preset", ["llama-3.1-8b", "gpt-oss-120b", "deepseek-v3"])
def test_no_step_with_prompts_or_drafts_compiles(preset: str, drafts: int) -> None:
    """Prompts of a token or of thousands, beside decodes and without them; drafts to verify."""
    backend, launchers = _warm(preset, speculative_num_draft_tokens=drafts)
    draw = random.Random(11)
    modes = [_EXTEND, _MIXED, *([ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND] if drafts else [])]
    for _ in range(150):
        mode, size = draw.choice(modes), draw.choice((1, 2, 3, 5, 9, 20, 60, 130, 200))
        longest = min(draw.choice((1, 4, 16, 40, 300, 1000)), max(4, 1500 // size))
        new = [draw.randint(1, longest) for _ in range(size)]
        if mode is _MIXED:
            new = [1] * (size // 2) + new[size // 2 :]
        elif mode is not _EXTEND:
            new = [drafts] * size
        cached = draw.choice((0, 10, 500, 8000, 60000))
        lengths = [n + draw.randint(0, cached) for n in new]
        _take(backend, launchers, _batch(mode, new, lengths, known=draw.random() < 0.7))


def test_no_part_of_a_mixed_step_compiles() -> None:
    """What `ForwardBatch.split` gives begins anywhere in the batch's tensors, not at multiples of 16 bytes."""
    backend, launchers = _warm("llama-3.1-8b")
    for new in ([1, 40, 700], [1, 1, 1, 9], [1, 1, 300]):
        batch = _batch(_MIXED, new, [n + 70 for n in new], known=True)
        for part in batch.split():
            _take(backend, launchers, part)


def _warm(preset: str, **wanted: Any) -> tuple[TritonBackend, AheadLaunchers]:
    config = AttentionConfig.preset(preset, page_size=PAGE).replace(**wanted)
    config = config.replace(kv_layout="MLA" if config.layers[0].kind == "mla" else "NHD")
    launchers = AheadLaunchers(Chip("sm_90", *CHIPS["sm_90"]))
    backend = TritonBackend(config, KVCache.allocate(config, num_pages=2), chip=launchers.chip, launchers=launchers)
    backend.warmup(config)
    return backend, launchers


def _batch(mode: ForwardMode, new: list[int], lengths: list[int], *, known: bool) -> ForwardBatch:
    batch = ForwardBatch.build(
        mode, query_lens=new, seq_lens=lengths, pages=[[0] * -(-n // PAGE) for n in lengths], page_size=PAGE,
        write=(False,) * len(new),
    )  # fmt: skip
    if not known:
        batch.seq_lens_cpu = None
    return batch


def _take(backend: TritonBackend, launchers: AheadLaunchers, batch: ForwardBatch) -> None:
    """A step of all layers, in which nothing is compiled."""
    warm = len(launchers.compiled)
    backend.init_forward_metadata(batch)
    for kind in backend.config.layers:
        warm_layer(backend, backend.config, kind, batch)
    shown = f"{batch.mode.name} of {batch.batch_size}, {batch.max_query_len} new, {batch.max_seq_len} keys"
    assert launchers.compiled[warm:] == [], shown
