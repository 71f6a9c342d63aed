"""Plans over the CUDA libraries together: one cache, a backend for each phase, over the stand-in libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.plan import Plan, plan
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.witness import Witness
from attn_core.testing.reference import reference

from .conftest import ROOT

HEADS = LayerKind(8, 2, 128, 128, layer_ids=(0,))
WINDOWED = LayerKind(8, 2, 128, 128, sliding_window=9, sinks=True, layer_ids=(0,))
LATENT = LayerKind(4, 1, 576, 512, kind="mla", scale=192**-0.5, layer_ids=(0,))
STEPS = (
    (ForwardMode.EXTEND, [70, 5], [70, 5]),
    (ForwardMode.EXTEND, [3, 60], [73, 65]),
    (ForwardMode.DECODE, [1, 1], [74, 66]),
    (ForwardMode.MIXED, [1, 6], [75, 72]),
    (ForwardMode.DECODE, [1, 1], [76, 73]),
)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every CUDA library as its package's stand-in."""
    for folder in ("attn-fa3", "attn-flashinfer", "attn-mla"):
        monkeypatch.syspath_prepend(str(ROOT / "plugins" / folder / "tests"))
    from attn_fa3 import library as fa3
    from attn_flashinfer import library as flashinfer
    from attn_flashinfer.wrappers import workspace
    from attn_mla import flashmla, trtllm
    from fake_flash_attention import FakeFlashAttention
    from fake_flashinfer import FakeFlashInfer
    from fake_mla_libraries import FakeLibraries

    modules = FakeFlashAttention().modules() | FakeFlashInfer().modules()
    latent = FakeLibraries().modules()
    modules["flash_mla"] = latent["flash_mla"]
    decode = latent["flashinfer.mla"].trtllm_batch_decode_with_kv_cache_mla
    modules["flashinfer.mla"].trtllm_batch_decode_with_kv_cache_mla = decode  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("attn_flashinfer.wrappers.WORKSPACE_BYTES", 1024)
    monkeypatch.setattr(trtllm, "WORKSPACE_BYTES", 1024)
    cached: tuple[Any, ...] = (fa3.load, flashinfer.load, workspace, flashmla.load, trtllm.load, trtllm.workspace)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("chip", "kind", "backend", "ran"),
    [
        ("sm_90", HEADS, {"prefill": "fa3", "decode": "flashinfer"}, {"prefill": "fa3", "decode": "flashinfer"}),
        ("sm_90", HEADS, {"prefill": "flashinfer", "decode": "fa3"}, {"prefill": "flashinfer", "decode": "fa3"}),
        ("sm_90", WINDOWED, {"prefill": "fa3", "decode": "flashinfer"}, {"prefill": "fa3", "decode": "flashinfer"}),
        ("sm_90", LATENT, "flashmla", {"prefill": "flashinfer_mla", "decode": "flashmla"}),
        ("sm_90", LATENT, "flashinfer_mla", {"prefill": "flashinfer_mla", "decode": "flashinfer_mla"}),
        ("sm_100", LATENT, "trtllm_mla", {"prefill": "flashinfer_mla", "decode": "trtllm_mla"}),
    ],
)
def test_prefill_and_decode_of_different_libraries_share_one_cache(
    libraries: None, chip: str, kind: LayerKind, backend: str | dict[str, str], ran: Mapping[str, str]
) -> None:
    torch.manual_seed(0)
    config = AttentionConfig(layers=(kind,), max_context_len=512)
    found = plan(config, backend, system=System.parse(f"cuda:{chip}"), fallback="allow")  # type: ignore[arg-type]
    assert {phase: part.backend.name for phase, part in found.phases.items()} == ran
    assert not any(part.converted for part in found.phases.values()), "one page size that is native to both"
    assert play(found, kind) == set(ran.values())


def play(found: Plan, kind: LayerKind) -> set[str]:
    """Run STEPS through the plan, each output compared with the oracle; the names of what ran."""
    assert found.config.page_size is not None
    cache = KVCache.allocate(found.config, num_pages=40)
    witness = Witness(build(found, cache))
    sinks = torch.randn(kind.num_q_heads) if kind.sinks else None
    layer = AttentionLayer.of_kind(kind, 0, sinks=sinks)
    pages = [list(range(39, 19, -1)), list(range(1, 20))]
    for mode, query, lens in STEPS:
        batch = ForwardBatch.build(
            mode, query_lens=query, seq_lens=lens, pages=pages, page_size=found.config.page_size
        )  # fmt: skip
        q = torch.randn(batch.num_tokens, kind.num_q_heads, kind.qk_head_dim).bfloat16()
        k = torch.randn(batch.num_tokens, kind.num_kv_heads, kind.qk_head_dim).bfloat16()
        v = None if kind.kind == "mla" else torch.randn_like(k)
        witness.backend.init_forward_metadata(batch)
        out = witness.backend.forward(q, k, v, layer, batch)
        assert isinstance(out, torch.Tensor)
        torch.testing.assert_close(out.double(), reference(q, layer, batch, cache)[0], atol=2e-2, rtol=2e-2)
    return set(witness.names)
