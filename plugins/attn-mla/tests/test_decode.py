"""`flashmla` and `trtllm_mla` against the oracle, over the stand-in libraries."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from attn_core.errors import BatchError, CapacityError, KernelError, PluginLoadError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference
from attn_mla import flashmla
from attn_mla.flashmla import FlashMLABackend
from attn_mla.latent_decode import LatentDecodeBackend
from attn_mla.trtllm import TRTLLMMLABackend
from fake_mla_libraries import FakeLibraries

BACKENDS = [FlashMLABackend, TRTLLMMLABackend]
STEPS = {
    "decode": (ForwardMode.DECODE, [1, 1, 1], [1, 64, 130]),
    "chain": (ForwardMode.TARGET_VERIFY, [4, 4], [131, 4]),
}


def config_of(heads: int = 4, layers: int = 1, **serving: Any) -> AttentionConfig:
    kind = LayerKind(heads, 1, 576, 512, kind="mla", scale=192**-0.5, layer_ids=tuple(range(layers)))
    return AttentionConfig(layers=(kind,), **{"page_size": 64, "kv_layout": "MLA", **serving})


def batch_of(mode: ForwardMode, query: list[int], lens: list[int], **more: Any) -> ForwardBatch:
    page, pages = 30, []
    for length in lens:
        count = -(-length // 64)
        pages.append(list(range(page, page - count, -1)))
        page -= count
    return ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=64, **more)


def random_cache(config: AttentionConfig) -> KVCache:
    cache = KVCache.allocate(config, num_pages=32)
    for i in cache.layer_ids:
        pool = cache.k(i)
        pool.copy_(torch.randn(pool.shape).to(pool.dtype))
    return cache


def queries(batch: ForwardBatch, heads: int = 4) -> torch.Tensor:
    return torch.randn(batch.num_tokens, heads, 576).bfloat16()


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", [1, 3, 16, 65, 127, 128])
def test_every_step_is_right(fake: FakeLibraries, cls: type[AttentionBackend], step: str, heads: int) -> None:
    torch.manual_seed(0)
    config, batch = config_of(heads), batch_of(*STEPS[step])
    cache = random_cache(config)
    backend, layer = cls(config, cache), AttentionLayer.of_kind(config.layers[0], 0)
    q, k = queries(batch, heads), torch.randn(batch.num_tokens, 1, 576).bfloat16()
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, k, None, layer, batch, return_lse=True)
    want, want_lse = reference(q, layer, batch, cache)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    mine = torch.full_like(out, 7.0)
    assert backend.forward(q, None, None, layer, batch, save_kv_cache=False, out=mine) is mine
    torch.testing.assert_close(mine.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("k_scale", [1.0, 0.25])
def test_an_fp8_latent_is_read_with_queries_in_e4m3(
    fake: FakeLibraries, cls: type[AttentionBackend], step: str, k_scale: float
) -> None:
    torch.manual_seed(0)
    config, batch = config_of(layers=2, kv_cache_dtype="fp8_e4m3"), batch_of(*STEPS[step])
    cache = random_cache(config)
    backend = cls(config, cache)
    backend.init_forward_metadata(batch)
    for layer_id in range(2):
        layer = AttentionLayer.of_kind(config.layers[0], layer_id, k_scale=k_scale)
        q, k = queries(batch), torch.randn(batch.num_tokens, 1, 576).bfloat16()
        q[0, 0, :3] = torch.tensor([500.0, -500.0, 2.0**-6])  # more than e4m3 holds at a scale of 1, and little
        out, lse = backend.forward(q, k, None, layer, batch, return_lse=True)
        rounded = 2 * (q / 2).to(torch.float8_e4m3fn).bfloat16()
        want, want_lse = reference(rounded, layer, batch, cache)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cls", BACKENDS)
def test_queries_that_no_scale_holds_are_nan_and_leave_the_others_alone(
    fake: FakeLibraries, cls: type[AttentionBackend]
) -> None:
    torch.manual_seed(0)
    config, batch = config_of(kv_cache_dtype="fp8_e4m3"), batch_of(*STEPS["decode"])
    cache = random_cache(config)
    backend, layer = cls(config, cache), AttentionLayer.of_kind(config.layers[0], 0)
    q = queries(batch)
    q[1, 2, 5] = 1e6
    backend.init_forward_metadata(batch)
    out = backend.forward(q, None, None, layer, batch)
    assert isinstance(out, torch.Tensor)
    assert out[1, 2].isnan().all()
    rounded = 64 * (q / 64).clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16()
    want, _ = reference(rounded, layer, batch, cache)
    right = torch.ones(3, 4, dtype=torch.bool)
    right[1, 2] = False
    torch.testing.assert_close(out.double()[right], want[right], atol=2e-2, rtol=2e-2)


def test_an_fp8_latent_is_refused_by_a_flash_mla_without_its_kernel(
    fake: FakeLibraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flash_mla

    config = config_of(kv_cache_dtype="fp8_e4m3")
    assert FlashMLABackend.build_reasons(config, "decode") == ()
    monkeypatch.delattr(flash_mla, "get_mla_decoding_metadata")
    flashmla.load.cache_clear()
    (found,) = FlashMLABackend.build_reasons(config, "decode")
    assert found.code == "build_unsupported"
    assert "fp8_e4m3" in str(found)
    assert FlashMLABackend.build_reasons(config_of(), "decode") == ()


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_row_without_keys_has_lse_minus_infinity(fake: FakeLibraries, cls: type[AttentionBackend]) -> None:
    config, batch = config_of(), batch_of(ForwardMode.TARGET_VERIFY, [2, 2], [9, 2])
    backend, layer = cls(config, random_cache(config)), AttentionLayer.of_kind(config.layers[0], 0)
    batch.seq_lens[1] = 1  # a padded request: fewer keys than queries
    backend.init_forward_metadata(batch)
    _, lse = backend.forward(queries(batch), None, None, layer, batch, return_lse=True)
    assert (lse[2] == float("-inf")).all()


def test_the_schedule_is_made_once_a_step_and_never_kept(fake: FakeLibraries) -> None:
    config = config_of(layers=3)
    backend = FlashMLABackend(config, random_cache(config))
    for lens in ([1, 64], [2, 65]):
        batch = batch_of(ForwardMode.DECODE, [1, 1], lens)
        backend.init_forward_metadata(batch)
        for i in range(3):
            backend.forward(queries(batch), None, None, AttentionLayer.of_kind(config.layers[0], i), batch)
    assert len(fake.schedules) == 2
    assert len(fake.calls) == 6


@pytest.mark.parametrize("cls", BACKENDS)
@pytest.mark.parametrize("q", [1, 3])
def test_replay_reads_the_batch_of_the_replay(fake: FakeLibraries, cls: type[AttentionBackend], q: int) -> None:
    torch.manual_seed(0)
    config = config_of(max_context_len=256)
    cache = random_cache(config)
    backend, layer = cls(config, cache), AttentionLayer.of_kind(config.layers[0], 0)
    mode = ForwardMode.DECODE if q == 1 else ForwardMode.TARGET_VERIFY
    backend.init_cuda_graph_state(4, 4 * q)
    captured = batch_of(mode, [q, q], [6, 7])
    backend.init_forward_metadata_capture_cuda_graph(captured)
    backend.forward(queries(captured), None, None, layer, captured)
    replayed = batch_of(mode, [q, q], [131, 70])
    backend.init_forward_metadata_replay_cuda_graph(replayed)
    asked = queries(replayed)
    out = backend.forward(asked, None, None, layer, captured, save_kv_cache=False)
    torch.testing.assert_close(out.double(), reference(asked, layer, replayed, cache)[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("cls", BACKENDS)
def test_graph_state_for_256_requests_at_128k_fits_in_64_mib(fake: FakeLibraries, cls: type[AttentionBackend]) -> None:
    config = config_of(max_context_len=131072)
    backend = cls(config, random_cache(config))
    assert isinstance(backend, LatentDecodeBackend)
    backend.init_cuda_graph_state(256, 256)
    assert backend._graphs is not None
    assert backend._graphs.nbytes < 64 << 20


@pytest.mark.parametrize("cls", BACKENDS)
def test_what_they_cannot_run_is_refused_by_name(fake: FakeLibraries, cls: type[AttentionBackend]) -> None:
    config = config_of(max_context_len=64)
    backend = cls(config, random_cache(config))
    with pytest.raises(BatchError, match=f"{cls.name} was given EXTEND"):
        backend.init_forward_metadata(batch_of(ForwardMode.EXTEND, [3], [9]))
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0]]))
    with pytest.raises(BatchError, match="a tree of drafts"):
        backend.init_forward_metadata(batch_of(ForwardMode.TARGET_VERIFY, [3], [9], tree=tree))
    with pytest.raises(BatchError, match="init_cuda_graph_state"):
        backend.init_forward_metadata_capture_cuda_graph(batch_of(*STEPS["decode"]))
    backend.init_cuda_graph_state(2, 2)
    with pytest.raises(CapacityError, match="graph of 3 requests"):
        backend.init_forward_metadata_capture_cuda_graph(batch_of(*STEPS["decode"]))
    with pytest.raises(BatchError, match="max_context_len"):
        backend.init_forward_metadata_replay_cuda_graph(batch_of(ForwardMode.DECODE, [1], [130]))


@pytest.mark.parametrize("cls", BACKENDS)
def test_a_librarys_error_keeps_its_cause(fake: FakeLibraries, cls: type[AttentionBackend]) -> None:
    config, batch = config_of(), batch_of(*STEPS["decode"])
    backend, layer = cls(config, random_cache(config)), AttentionLayer.of_kind(config.layers[0], 0)
    backend.init_forward_metadata(batch)
    fake.fail = RuntimeError("no kernel image is available")
    with pytest.raises(KernelError, match="no kernel image") as caught:
        backend.forward(queries(batch), None, None, layer, batch)
    assert caught.value.__cause__ is fake.fail


@pytest.mark.parametrize("has", [True, False, None])
def test_upstream_is_refused_once_it_has_dropped_dense_decode(
    fake: FakeLibraries, monkeypatch: pytest.MonkeyPatch, has: bool | None
) -> None:
    import flash_mla

    def upstream(q, tile_scheduler_metadata, num_splits=None) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", upstream)
    monkeypatch.delattr(flash_mla, "has_legacy")
    if has is not None:
        extension = ModuleType("flash_mla.cuda")
        if has:
            extension.dense_decode_fwd = upstream
        monkeypatch.setitem(sys.modules, "flash_mla.cuda", extension)
    found = FlashMLABackend.build_reasons(config_of(), "decode")
    assert [reason.code for reason in found] == ([] if has else ["build_unsupported"])
    assert all("dropped" in str(reason) for reason in found)


def test_a_build_without_the_hopper_kernels_is_refused(fake: FakeLibraries) -> None:
    assert FlashMLABackend.build_reasons(config_of(), "decode") == ()
    fake.legacy = False
    (found,) = FlashMLABackend.build_reasons(config_of(), "decode")
    assert found.code == "build_unsupported"


def test_a_flash_mla_of_the_old_interface_is_refused(fake: FakeLibraries, monkeypatch: pytest.MonkeyPatch) -> None:
    import flash_mla

    def old(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", old)
    with pytest.raises(PluginLoadError, match="two tensors"):
        flashmla.load()


def test_upstreams_interface_is_called_without_the_forks_option(
    fake: FakeLibraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flash_mla

    def upstream(q, tile_scheduler_metadata, num_splits=None) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", upstream)
    assert flashmla.load().hopper == {}
