"""Partial results take room that the chip bounds: made once, whatever steps come, and small beside a page table."""

from __future__ import annotations

import random
from typing import Any

import pytest
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_triton.ahead import CHIPS, AheadLaunchers, Compiled
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.launch import Launcher
from attn_triton.warm import warm_layer

PAGE, DRAFTS = 64, 8
#: What the state of graphs for 256 requests may take beside the page table.
MOST_BYTES = 64 << 20
CONFIGS = [
    (preset, kv) for preset in ("llama-3.1-8b", "gpt-oss-120b", "deepseek-v3") for kv in ("auto", "fp8_e4m3")
]  # fmt: skip


@pytest.fixture(autouse=True)
def only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are asked for and not compiled."""

    def asked(chip: Chip, launcher: Launcher, args: Any, odd: frozenset[int]) -> Compiled:
        return Compiled(launcher.name, 4, 0, 0, launcher.constants)

    monkeypatch.setattr("attn_triton.ahead.compile_for", asked)


def backend_of(preset: str, kv_dtype: str, arch: str = "sm_90", drafts: int = DRAFTS) -> TritonBackend:
    config = AttentionConfig.preset(preset, page_size=PAGE).replace(
        kv_cache_dtype=kv_dtype, speculative_num_draft_tokens=drafts, max_context_len=131072
    )
    config = config.replace(kv_layout="MLA" if config.layers[0].kind == "mla" else "NHD")
    launchers = AheadLaunchers(Chip(arch, *CHIPS[arch]))
    return TritonBackend(config, KVCache.allocate(config, num_pages=2), chip=launchers.chip, launchers=launchers)


@pytest.mark.parametrize(("preset", "kv_dtype"), CONFIGS)
def test_it_is_made_once(preset: str, kv_dtype: str) -> None:
    backend, draw = backend_of(preset, kv_dtype), random.Random(3)
    sizes: set[int] = set()
    for _ in range(150):
        mode = draw.choice((ForwardMode.DECODE, ForwardMode.DECODE, ForwardMode.TARGET_VERIFY, ForwardMode.EXTEND))
        size, longest = draw.randint(1, 256), draw.choice((16, 2000, 40000, 131072))
        few = {ForwardMode.DECODE: 1, ForwardMode.TARGET_VERIFY: DRAFTS, ForwardMode.EXTEND: draw.randint(1, 8)}
        new = [few[mode]] * size
        alike = draw.random() < 0.5
        lengths = [few[mode] + (longest if alike else draw.randint(0, longest)) for _ in new]
        batch = ForwardBatch.build(
            mode, query_lens=new, seq_lens=lengths, pages=[[0] * -(-n // PAGE) for n in lengths], page_size=PAGE,
            write=(False,) * size,
        )  # fmt: skip
        if draw.random() < 0.3:
            batch.seq_lens_cpu = None
        backend.init_forward_metadata(batch)
        for kind in backend.config.cached_kinds:
            warm_layer(backend, backend.config, kind, batch)
        sizes |= {workspace.nbytes for workspace in backend._workspaces.values()}
    assert len(sizes) == 1
    assert sizes.pop() <= MOST_BYTES


@pytest.mark.parametrize("arch", [arch for arch in CHIPS if arch.startswith("sm_")])
@pytest.mark.parametrize(("preset", "kv_dtype"), CONFIGS)
@pytest.mark.parametrize("tokens", [1, DRAFTS])
def test_the_state_of_graphs_is_small(preset: str, kv_dtype: str, arch: str, tokens: int) -> None:
    """256 requests of 131072 tokens, on chips where graphs are claimed."""
    backend = backend_of(preset, kv_dtype, arch)
    backend.init_cuda_graph_state(256, 256 * tokens)
    graphs = backend._graphs
    assert graphs is not None
    assert 0 < graphs.nbytes < MOST_BYTES
    assert graphs.pages.shape == (256, 131072 // PAGE)
