"""`fa4` against the oracle, over the stand-in library, and its calls against the real wheel's signature."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import attn_fa3
import pytest
import torch
from attn_core.errors import BatchError, KernelError, PluginLoadError
from attn_core.planning.config import AttentionConfig
from attn_core.planning.manifest import Manifest
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.claimed import missing_codes
from attn_core.testing.generation import generate_cases
from attn_core.testing.reference import reference, reference_ragged
from attn_core.testing.refusals import refusal_cases
from attn_fa3 import fa4
from attn_fa3.fa4 import FA4Backend
from fake_flash_attention import FakeFlashAttention
from real_wheel import signature_of, source
from test_backend import FEATURES, KIND, STEPS, batch_of, config_of, inputs, layer_of, random_cache

FLASH_ATTN_4 = "flash-attn-4==4.0.0b36"


def check_step(config: AttentionConfig, batch: ForwardBatch, i: int = 0) -> None:
    torch.manual_seed(0)
    cache = random_cache(config)
    layer, backend = layer_of(config, i, torch.bfloat16), FA4Backend(config, cache)
    q, k, v = inputs(config.layers[i], batch.num_tokens)
    backend.init_forward_metadata(batch)
    out, lse = backend.forward(q, None if layer.cross else k, None if layer.cross else v, layer, batch, return_lse=True)
    want, want_lse = reference(q, layer, batch, cache)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    mine = torch.full_like(out, 7.0)
    assert backend.forward(q, None, None, layer, batch, save_kv_cache=False, out=mine) is mine
    torch.testing.assert_close(mine.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_step_with_every_feature_is_right(fake: FakeFlashAttention, step: str, feature: str) -> None:
    check_step(config_of(replace(KIND, **FEATURES[feature])), batch_of(*STEPS[step]))


def test_cross_keys_are_the_encoders_and_not_causal(fake: FakeFlashAttention) -> None:
    batch = batch_of(ForwardMode.EXTEND, [3, 2], [5, 2], encoder_seq_lens=[7, 3], encoder_pages=[[5, 4], [6]])
    check_step(config_of(KIND, replace(KIND, cross=True)), batch, i=1)


@pytest.mark.parametrize("causal", [True, False])
def test_ragged(fake: FakeFlashAttention, causal: bool) -> None:
    torch.manual_seed(0)
    kind = replace(KIND, ragged=True, sinks=True)
    layer = AttentionLayer.of_kind(kind, 1, sinks=torch.randn(6).bfloat16())
    q = torch.randn(6, 6, 16).bfloat16()
    k, v = torch.randn(11, 2, 16).bfloat16(), torch.randn(11, 2, 16).bfloat16()
    starts = {"query_start_loc": torch.tensor([0, 4, 6]).int(), "key_start_loc": torch.tensor([0, 8, 11]).int()}
    backend = FA4Backend(config_of(KIND), random_cache(config_of(KIND)))
    out, lse = backend.forward_ragged(
        q, k, v, layer, **starts, max_query_len=4, max_key_len=8, causal=causal, return_lse=True
    )
    want, want_lse = reference_ragged(q, k, v, layer, **starts, causal=causal)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 3])
def test_replay_reads_the_batch_of_the_replay(fake: FakeFlashAttention, n: int) -> None:
    torch.manual_seed(0)
    config = config_of(KIND, max_context_len=40)
    cache = random_cache(config)
    backend, layer = FA4Backend(config, cache), layer_of(config)
    mode = ForwardMode.DECODE if n == 1 else ForwardMode.TARGET_VERIFY
    backend.init_cuda_graph_state(4, 4 * n)
    captured = batch_of(mode, [n, n], [6, 7])
    backend.init_forward_metadata_capture_cuda_graph(captured)
    replayed = batch_of(mode, [n, n], [31, 18])
    backend.init_forward_metadata_replay_cuda_graph(replayed)
    q, k, v = inputs(KIND, 2 * n)
    cache.write(layer, replayed.slot_mapping, k, v)
    out = backend.forward(q, None, None, layer, captured, save_kv_cache=False)
    torch.testing.assert_close(out.double(), reference(q, layer, replayed, cache)[0], atol=2e-2, rtol=2e-2)


def test_trees_and_the_librarys_errors_are_typed(fake: FakeFlashAttention) -> None:
    config = config_of(KIND)
    backend = FA4Backend(config, random_cache(config))
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0]]))
    batch = batch_of(ForwardMode.TARGET_VERIFY, [3], [9], tree=tree)
    with pytest.raises(BatchError, match="tree of drafts"):
        backend.init_forward_metadata(batch)
    decode = batch_of(*STEPS["decode"])
    backend.init_forward_metadata(decode)
    fake.fail = AssertionError("SplitKV not supported on SM 9.0")
    with pytest.raises(KernelError, match="SplitKV") as caught:
        backend.forward(*inputs(KIND, 3), layer_of(config), decode)
    assert caught.value.__cause__ is fake.fail


def test_every_call_binds_to_the_real_signature(fake: FakeFlashAttention) -> None:
    real = signature_of(source(FLASH_ATTN_4, "flash_attn/cute/interface.py"), "flash_attn_varlen_func")
    assert set(fa4.ARGUMENTS) <= set(real.parameters)
    for step in STEPS:
        check_step(config_of(replace(KIND, sinks=True, softcap=3.0, sliding_window=5)), batch_of(*STEPS[step]))
    for call in fake.varlen_calls:
        real.bind(**{name: value for name, value in call.items() if name != "self"})
    assert len(fake.varlen_calls) == 2 * len(STEPS)
    positional = list(inspect.signature(fake._varlen()).parameters)[:3]
    assert list(real.parameters)[:3] == positional


def test_the_reason_for_small_pages_still_holds() -> None:
    text = source(FLASH_ATTN_4, "flash_attn/cute/interface.py")
    assert "P = 0 times a NaN V row is still NaN" in text
    assert "page_size == tile_n" in text


def test_a_changed_library_is_refused_when_it_is_loaded(
    fake: FakeFlashAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flash_attn.cute

    def flash_attn_varlen_func(q, k, v) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr(flash_attn.cute, "flash_attn_varlen_func", flash_attn_varlen_func)
    with pytest.raises(PluginLoadError, match="has no argument"):
        fa4.load()


def manifest() -> Manifest:
    return Manifest.parse((Path(attn_fa3.__file__).parent / "fa4.toml").read_text())


@pytest.mark.parametrize("chip", ["cuda:sm_90", "cuda:sm_100"])
def test_every_case_of_the_kit_is_accepted_or_refused_with_a_code_that_fits(chip: str) -> None:
    here = System.parse(chip)
    cases = generate_cases(manifest(), "contract", here) + refusal_cases(manifest(), "contract", here)
    for case in cases:
        decisions = [evaluate(manifest(), case.config(), phase, here) for phase in case.phases]
        codes = {reason.code for decision in decisions for reason in decision.reasons}
        assert codes <= missing_codes(manifest(), case, here), f"{case.id}: {codes}"
        assert bool(codes) == bool(case.refused), f"{case.id}: {codes}"


def test_versions_and_chips_are_enforced() -> None:
    wide = replace(KIND, qk_head_dim=128, v_head_dim=128)
    config = AttentionConfig(layers=(wide,))
    for dists, chip, code in (
        ({}, "sm_90", "missing_dist"),
        ({"flash-attn-4": "4.0.0b12"}, "sm_90", "dist_version"),
        ({"flash-attn-4": "4.0.0b36"}, "sm_80", "arch_mismatch"),
        ({"flash-attn-4": "4.0.0b36"}, "sm_90", None),
    ):
        found = evaluate(manifest(), config, "decode", System("cuda", chip, dists=dists)).reasons
        assert [reason.code for reason in found] == ([code] if code else [])


@pytest.mark.parametrize(("page", "native"), [(16, 16), (64, 32), (128, 32)])
def test_large_pages_are_read_as_smaller_ones(page: int, native: int) -> None:
    wide = replace(KIND, qk_head_dim=128, v_head_dim=128)
    config = AttentionConfig(layers=(wide,), page_size=page, kv_layout="NHD")
    assert evaluate(manifest(), config, "decode", System.parse("cuda:sm_90")).native_page_size == native
