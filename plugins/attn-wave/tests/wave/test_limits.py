"""What is refused, where, and with which reason: the manifest first, then what is installed, then the tensors."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
import torch
from attn_core.errors import BatchError, CapacityError, ConfigError, PluginLoadError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_wave import limits, runtime
from attn_wave.backend import WaveBackend
from attn_wave.emulator.device import Gfx942
from attn_wave.join_variant import JoinVariant, all_kernels
from attn_wave.limits import check_layer, needed_variants, refusals
from attn_wave.tables import check_pool
from attn_wave.variant import Variant

from .small import PAGE, config_of

MANIFEST = Manifest.parse(files("attn_wave").joinpath("wave.toml").read_text(), source="wave.toml")
MI300 = Gfx942().system()


def kind_of(q_heads: int, kv_heads: int, width: int, v_width: int | None = None, **more: Any) -> LayerKind:
    return LayerKind(q_heads, kv_heads, width, v_width or width, **more)


LLAMA = AttentionConfig((kind_of(32, 8, 128),), dtype="bfloat16")
MLA = kind_of(128, 1, 576, 512, kind="mla", scale=0.1)

ACCEPTED = {
    "Llama": LLAMA,
    "pages of 1": LLAMA.replace(page_size=1),
    "pages of 48, in HND": LLAMA.replace(page_size=48, kv_layout="HND"),
    "a window, a soft cap, sinks": LLAMA.replace(
        layers=(kind_of(64, 8, 64, sliding_window=128, softcap=30.0, sinks=True),), lse=True
    ),
    "trees of draft tokens": LLAMA.replace(speculative_num_draft_tokens=8, speculative_eagle_topk=4),
    "spans": LLAMA.replace(bidirectional_spans=True),
    "graphs": LLAMA.replace(cuda_graph=True),
    "a group of 71": LLAMA.replace(layers=(kind_of(71, 1, 64),)),
    "cross attention": LLAMA.replace(layers=(kind_of(8, 8, 128, cross=True),)),
    "deterministic": LLAMA.replace(deterministic=True),
    "DeepSeek-V3, absorbed": LLAMA.replace(layers=(MLA,), speculative_num_draft_tokens=2),
    "expanded MLA": LLAMA.replace(layers=(kind_of(128, 128, 192, 128, ragged=True),), lse=True),
}
REFUSED = {
    "float32": (LLAMA.replace(dtype="float32"), "dtype_unsupported", "float32"),
    "an fp8 cache": (LLAMA.replace(kv_cache_dtype="fp8_e4m3"), "kv_dtype_unsupported", "fp8_e4m3"),
    "heads of 96": (LLAMA.replace(layers=(kind_of(8, 4, 96),)), "head_dim_unsupported", "96/96"),
    "192/128 in pages": (LLAMA.replace(layers=(kind_of(8, 8, 192, 128),)), "head_dim_unsupported", "192/128"),
    "spans of MLA": (
        LLAMA.replace(layers=(MLA,), bidirectional_spans=True), "feature_unsupported", "bidirectional_spans"),
    "batch invariance": (LLAMA.replace(batch_invariant=True), "feature_unsupported", "batch_invariant"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_planned(name: str) -> None:
    config = ACCEPTED[name]
    for phase in config.phases:
        decision = evaluate(MANIFEST, config, phase, MI300)
        assert decision.accepted, decision


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_reason(name: str) -> None:
    config, code, wanted = REFUSED[name]
    reasons = evaluate(MANIFEST, config, "prefill", MI300).reasons
    assert any(reason.code == code and wanted in str(reason.wanted) for reason in reasons), reasons


@pytest.mark.parametrize(
    ("system", "code"),
    [("rocm:gfx950", "arch_mismatch"), ("rocm:gfx90a", "arch_mismatch"), ("cuda:sm_90", "device_mismatch")],
)
def test_another_chip_is_refused(system: str, code: str) -> None:
    """gfx950 among them: kernels compile for it, and what they do there nobody has seen, not even in an emulator."""
    reasons = evaluate(MANIFEST, LLAMA, "decode", System.parse(system)).reasons
    assert [reason.code for reason in reasons] == [code]


def test_a_machine_without_waves_runtime_is_refused_by_name() -> None:
    bare = System(device="rocm", arch="gfx942", dists={})
    (reason,) = evaluate(MANIFEST, LLAMA, "decode", bare).reasons
    assert (reason.code, "wave-lang" in str(reason)) == ("missing_dist", True)


def test_a_build_without_kernels_needs_the_compiler_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(refusals(LLAMA, "decode")) == []
    monkeypatch.setattr(limits, "is_current", lambda arch: False)
    monkeypatch.setattr(limits, "wave_version", lambda: "4.0.0")
    (reason,) = refusals(LLAMA, "decode")
    assert (reason.code, reason.have) == ("build_unsupported", "4.0.0")
    monkeypatch.setattr(limits, "wave_version", lambda: limits.WAVE_VERSION)
    assert list(refusals(LLAMA, "decode")) == []


# -- on a machine without ROCm


def test_without_a_card_it_builds_and_refuses_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    backend = WaveBackend(config, KVCache.allocate(config, num_pages=4))
    batch = ForwardBatch.build(ForwardMode.DECODE, query_lens=[1], seq_lens=[1], pages=[[1]], page_size=PAGE)
    backend.init_forward_metadata(batch)
    q, k = torch.zeros(1, 4, 64).half(), torch.zeros(1, 2, 64).half()
    with pytest.raises(PluginLoadError, match="the backend wave on cpu"):
        backend.forward(q, k, k, AttentionLayer.of_kind(config.layers[0], 0), batch)


def test_an_unknown_chip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_FORCE_SYSTEM", "rocm:gfx90a")
    with pytest.raises(ConfigError, match="wave kernels for gfx90a"):
        runtime.chip_of(torch.device("cpu"))


# -- layers, caches and batches


@pytest.mark.parametrize(
    ("change", "dtypes", "says"),
    [
        ({"qk_head_dim": 96, "v_head_dim": 96}, (torch.float16, torch.float16), "heads of 96/96"),
        ({}, (torch.float32, torch.float32), "queries of torch.float32"),
        ({}, (torch.float16, torch.bfloat16), "a cache of torch.bfloat16"),
        ({"cross": True, "sliding_window": 4}, (torch.float16, torch.float16), "a window on a cross layer"),
    ],
)
def test_a_layer_that_no_kernel_is_for_is_refused(change: dict[str, Any], dtypes: Any, says: str) -> None:
    layer = AttentionLayer.of_kind(kind_of(4, 2, 64), 0)
    check_layer(layer, torch.float16, torch.float16)
    with pytest.raises(ConfigError, match=says):
        check_layer(replace(layer, **change), *dtypes)


def test_rows_that_cannot_be_addressed_are_refused() -> None:
    pool = torch.zeros(4, 16, 2, 64, dtype=torch.float16)
    check_pool(0, "k", pool)
    with pytest.raises(ConfigError, match="multiples of 8 elements"):
        check_pool(0, "k", torch.zeros(4, 16, 2, 68, dtype=torch.float16)[..., :64])
    with pytest.raises(ConfigError, match="at address"):
        check_pool(0, "k", torch.zeros(4 * 16 * 2 * 64 + 1, dtype=torch.float16)[1:].view(4, 16, 2, 64))
    huge = torch.empty(2**20, 2**11, 2, 64, dtype=torch.float16, device="meta")
    with pytest.raises(ConfigError, match="spans"):
        check_pool(0, "k", huge)


def batch_of(queries: list[int], **more: Any) -> ForwardBatch:
    pages = [[1 + b] for b in range(len(queries))]
    return ForwardBatch.build(
        ForwardMode.TARGET_VERIFY, query_lens=queries, seq_lens=queries, pages=pages, page_size=PAGE, **more
    )


@pytest.fixture
def built(emulated: Gfx942) -> WaveBackend:
    config = config_of()
    return WaveBackend(config, KVCache.allocate(config, num_pages=8))


def step(backend: WaveBackend, batch: ForwardBatch, layer: AttentionLayer | None = None) -> Any:
    backend.init_forward_metadata(batch)
    q, k = (torch.zeros(batch.num_tokens, n, 64).half() for n in (4, 2))
    return backend.forward(q, k, k, layer or AttentionLayer.of_kind(backend.config.layers[0], 0), batch)


def test_host_lengths_are_needed(built: WaveBackend) -> None:
    with pytest.raises(BatchError, match="without its lengths on the host"):
        step(built, replace(batch_of([2]), seq_lens_cpu=None))


def test_a_tree_of_another_size_is_refused(built: WaveBackend) -> None:
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0]]))
    with pytest.raises(BatchError, match="a tree of 3"):
        step(built, batch_of([2], tree=tree))


def test_a_cross_layer_needs_an_encoder(built: WaveBackend) -> None:
    layer = replace(AttentionLayer.of_kind(built.config.layers[0], 0), cross=True)
    with pytest.raises(BatchError, match="without encoder keys"):
        step(built, batch_of([2]), layer)


def test_a_window_over_given_keys_is_causal(built: WaveBackend) -> None:
    layer = replace(AttentionLayer.of_kind(built.config.layers[0], 0), sliding_window=4)
    starts, x = torch.tensor([0, 3], dtype=torch.int32), torch.zeros(3, 4, 64).half()
    with pytest.raises(ConfigError, match="keys that are not causal"):
        built.forward_ragged(
            x, x[:, :2], x[:, :2], layer, query_start_loc=starts, key_start_loc=starts, max_query_len=3, max_key_len=3,
            causal=False,
        )  # fmt: skip


def test_graphs_keep_to_what_was_captured(built: WaveBackend) -> None:
    with pytest.raises(BatchError, match="without its buffers"):
        built.init_forward_metadata_capture_cuda_graph(batch_of([2, 2]))
    with pytest.raises(ConfigError, match="graphs of 4 requests and 2 tokens"):
        built.init_cuda_graph_state(4, 2)
    built.init_cuda_graph_state(2, 4)
    with pytest.raises(CapacityError, match="3 requests, 3 tokens"):
        built.init_forward_metadata_capture_cuda_graph(batch_of([1, 1, 1]))
    with pytest.raises(BatchError, match="3 tokens for 2 requests"):
        built.init_forward_metadata_capture_cuda_graph(batch_of([1, 2]))
    built.init_forward_metadata_capture_cuda_graph(batch_of([2, 2]))
    with pytest.raises(BatchError, match="no graph of 1 requests and 2 tokens"):
        built.init_forward_metadata_replay_cuda_graph(batch_of([2]))
    with pytest.raises(CapacityError, match="a sequence of 17 tokens"):
        built.init_forward_metadata_replay_cuda_graph(replace(batch_of([2, 2]), max_seq_len=17))
    tree = TreeMask.from_parents(torch.tensor([[-1, 0], [-1, 0]]))
    with pytest.raises(BatchError, match="a batch with tree"):
        built.init_forward_metadata_replay_cuda_graph(batch_of([2, 2], tree=tree))


# -- ahead of time


@pytest.mark.parametrize(
    "preset", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "deepseek-v3", "gemma-2-9b"],
)  # fmt: skip
def test_everything_a_model_needs_is_shipped(preset: str) -> None:
    config = AttentionConfig.preset(preset, speculative_num_draft_tokens=8, speculative_eagle_topk=4)
    needed = set(needed_variants(config))
    assert needed <= set(all_kernels())
    assert any(isinstance(variant, Variant) and variant.tree for variant in needed)
    assert any(isinstance(variant, JoinVariant) for variant in needed)


def test_a_model_whose_heads_have_no_kernel_is_refused_in_warmup() -> None:
    with pytest.raises(ConfigError, match="heads of 96/96"):
        list(needed_variants(LLAMA.replace(layers=(kind_of(8, 4, 96),))))


def test_warmup_takes_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a chip that is not here, by `attn warmup wave --arch gfx942 --model llama-3.1-8b`; nothing is compiled."""
    from attn_core.cli.warmup import command
    from attn_wave import shipped
    from click.testing import CliRunner

    monkeypatch.setenv("ATTN_FORCE_SYSTEM", "")
    monkeypatch.setattr(shipped, "compile_variant", lambda *asked: pytest.fail("it was compiled"))
    ran = CliRunner().invoke(command, ["wave", "--arch", "gfx942", "--model", "llama-3.1-8b"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    assert "wave is warm for llama-3.1-8b on rocm:gfx942" in ran.stderr


def test_variants_are_named_apart() -> None:
    keys = [variant.key for variant in all_kernels()]
    assert len(keys) == len(set(keys)) == 60
    assert Variant(64, 64, "float16", 16, softcap=True, tree=True).key == "64x64-float16-16-softcap-tree"
