"""What a carried module leaves out: mask modes that no route of the backend leads to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_flashinfer.modules import Module, modules_of
from real_wheel import source

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from unused_masks import CAUSAL, CUSTOM, DECLARED, INSTANCE, NOT_CAUSAL, leave_out, used_masks

FLASHINFER = "flashinfer-python==0.7.2.post1"
PLAIN = Module("bfloat16", "auto", 128, 128, False, False, "fa2")
INSTANCES = """#include <flashinfer/attention/prefill.cuh>
namespace flashinfer {
constexpr auto use_custom_mask = MaskMode::%s == MaskMode::kCustom;
template cudaError_t %s<
    /*CTA_TILE_Q=*/16, 128, MaskMode::%s,
    DefaultAttention<use_custom_mask, false>, Params>(Params params, float* tmp_s, cudaStream_t stream);
};
"""
NAMES = ("kNone", "kCausal", "kCustom", "kMultiItemScoring")


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_what_a_step_can_ask_for_is_kept(window: int | None, kv_dtype: str) -> None:
    kinds = [LayerKind(8, 2, 128, 128, sliding_window=window, cross=cross) for cross in (False, True)]
    for kind in kinds[: 1 if window else 2]:
        config = AttentionConfig(
            layers=(kind,), kv_cache_dtype=kv_dtype, speculative_num_draft_tokens=4, speculative_eagle_topk=2,
            bidirectional_spans=not kind.cross,
        )  # fmt: skip
        decode, prefill, verify = (modules_of(config, kind, phase, (9, 0)) for phase in ("decode", "prefill", "verify"))
        asked = {(module, NOT_CAUSAL) for module in decode}
        if not kind.cross:
            asked |= {(module, CUSTOM) for module in verify}
            asked |= {(prefill[0], CAUSAL), (prefill[1], CUSTOM)}
        assert asked
        assert all(mask in used_masks(module)["paged"] for module, mask in asked)


def test_given_keys_are_causal_or_not_but_never_masked_by_bits() -> None:
    given = LayerKind(16, 16, 192, 128, ragged=True)
    (module,) = modules_of(AttentionConfig(layers=(given,)), given, "prefill", (9, 0))
    assert used_masks(module) == {"paged": (), "ragged": (NOT_CAUSAL, CAUSAL)}
    assert used_masks(PLAIN)["ragged"] == (NOT_CAUSAL, CAUSAL)
    assert used_masks(PLAIN._replace(kv_dtype="fp8_e4m3"))["ragged"] == ()
    assert not used_masks(Module("bfloat16", "auto", 576, 512, False, False, "mla_fa3"))


def test_what_is_left_out_answers_with_an_error(tmp_path: Path) -> None:
    sources = [tmp_path / "batch_prefill.cu"]
    sources[0].write_text(source(FLASHINFER, "flashinfer/data/csrc/batch_prefill.cu"))
    for keys in ("paged", "ragged"):
        for number, name in enumerate(NAMES):
            sources.append(tmp_path / f"batch_prefill_{keys}_kernel_mask_{number}.cu")
            sources[-1].write_text(INSTANCES % (name, f"Dispatched_{keys}", name))
    assert leave_out(PLAIN._replace(window=True), sources) == 3
    host = sources[0].read_text()
    specialised = host[: host.index(DECLARED)]
    assert specialised.count("return cudaErrorNotSupported; }") == 5
    assert "MaskMode::kCustom,\n    DefaultAttention<true, false>" in specialised
    assert "MaskMode::kNone,\n    DefaultAttention<false, false>" in specialised, "given keys that are not causal"
    kept = {path.name for path in sources[1:] if "template" in path.read_text()}
    assert kept == {
        f"batch_prefill_{name}.cu" for name in ("paged_kernel_mask_0", "paged_kernel_mask_1", "ragged_kernel_mask_1")
    }


@pytest.mark.parametrize("name", ["batch_prefill.cu", "batch_prefill_sm90.cu"])
def test_the_library_declares_its_kernels_where_the_answers_go(name: str) -> None:
    assert source(FLASHINFER, f"flashinfer/data/csrc/{name}").count(DECLARED) == 1


@pytest.mark.parametrize("keys", ["paged", "ragged"])
@pytest.mark.parametrize("kernels", ["", "_sm90"])
def test_the_library_s_instances_are_found(keys: str, kernels: str) -> None:
    text = source(FLASHINFER, f"flashinfer/data/csrc/batch_prefill_{keys}{kernels}_kernel_inst.jinja")
    assert INSTANCE.findall(text)
