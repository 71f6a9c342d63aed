"""Which compiled modules a config needs, and what is refused where they are missing and nothing can compile them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_flashinfer.mha import FlashInferBackend
from attn_flashinfer.mla import FlashInferMLABackend
from attn_flashinfer.modules import Module, modules_of
from fake_flashinfer import FakeFlashInfer
from real_wheel import signature_of, source

KIND = LayerKind(8, 2, 128, 128)
WINDOWED = replace(KIND, sliding_window=9)
MLA = LayerKind(16, 1, 576, 512, kind="mla", scale=192**-0.5)
EXPANDED = LayerKind(16, 16, 192, 128, ragged=True)
FLASHINFER = "flashinfer-python==0.7.2.post1"
HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("kind", "serving", "phase", "chip", "wanted"),
    [
        (KIND, {}, "decode", HOPPER, [("auto", False, False, "fa2")]),
        (KIND, {}, "prefill", HOPPER, [("auto", False, False, "fa3")]),
        (KIND, {}, "prefill", AMPERE, [("auto", False, False, "fa2")]),
        (WINDOWED, {}, "prefill", HOPPER, [("auto", True, False, "fa2")]),
        (replace(KIND, softcap=3.0), {}, "decode", HOPPER, [("auto", False, True, "fa2")]),
        (replace(KIND, cross=True), {}, "prefill", HOPPER, [("auto", False, False, "fa2")]),
        (KIND, {"kv_cache_dtype": "fp8_e4m3"}, "prefill", HOPPER, [("fp8_e4m3", False, False, "fa2")]),
        (WINDOWED, {"speculative_eagle_topk": 2}, "verify", HOPPER, [("auto", False, False, "fa2")]),
        (WINDOWED, {}, "verify", HOPPER, [("auto", True, False, "fa2")]),
        (
            KIND,
            {"bidirectional_spans": True},
            "prefill",
            HOPPER,
            [("auto", False, False, "fa3"), ("auto", False, False, "fa2")],
        ),
        (EXPANDED, {"kv_cache_dtype": "fp8_e4m3"}, "prefill", HOPPER, [("auto", False, False, "fa3")]),
        (MLA, {}, "decode", HOPPER, [("auto", False, False, "mla_fa3")]),
        (MLA, {"kv_cache_dtype": "fp8_e4m3"}, "decode", HOPPER, [("fp8_e4m3", False, False, "mla_fa3")]),
        (MLA, {}, "decode", AMPERE, [("auto", False, False, "mla_fa2")]),
    ],
)  # fmt: skip
def test_modules_are_those_of_the_route(
    kind: LayerKind, serving: dict[str, Any], phase: Phase, chip: tuple[int, int], wanted: list[Any]
) -> None:
    more = {"speculative_num_draft_tokens": 4} if phase == "verify" else {}
    config = AttentionConfig(layers=(kind,), **serving, **more)
    widths = (kind.qk_head_dim, kind.v_head_dim)
    expected = [Module("bfloat16", kv, *widths, window, cap, kernels) for kv, window, cap, kernels in wanted]
    assert modules_of(config, kind, phase, chip) == expected


def arguments(module: Module) -> tuple[Any, ...]:
    """How the stand-in knows a module: what its generator was called with."""
    seen: list[tuple[Any, ...]] = []

    def spec(*given: Any) -> None:
        seen.append(given)

    with pytest.MonkeyPatch.context() as patch:
        import flashinfer.jit.attention.modules as made

        for name in ("gen_batch_mla_module", "_gen_batch_prefill_primary_module", "gen_batch_prefill_module"):
            patch.setattr(made, name, spec)
        module.spec()
    return seen[0]


def test_a_machine_that_can_compile_lacks_nothing(fake: FakeFlashInfer) -> None:
    assert list(FlashInferBackend.build_reasons(AttentionConfig(layers=(KIND,)), "decode")) == []


@pytest.mark.parametrize("disabled", [False, True])
def test_without_a_compiler_only_what_is_there_is_taken(
    fake: FakeFlashInfer, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    config = AttentionConfig(layers=(KIND, replace(KIND, sliding_window=9)))
    fake.cuda_path = "/nowhere"
    plain = modules_of(config, KIND, "decode", AMPERE)[0]
    if disabled:
        monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    fake.built.append(arguments(plain))
    found = FlashInferBackend.build_reasons(config, "decode")
    assert [(r.code, r.kind) for r in found] == [("build_unsupported", i) for i in ([0, 1] if disabled else [1])]
    fake.shipped.append(arguments(plain))
    (lacking,) = FlashInferBackend.build_reasons(config, "decode")
    assert lacking.wanted == "fa2 bfloat16 over bfloat16, 128/128, window"
    assert ("FLASHINFER_DISABLE_JIT" if disabled else "nvcc") in str(lacking.have)


def test_the_latent_and_its_expanded_prefill_are_asked_for(fake: FakeFlashInfer) -> None:
    fake.cuda_path = "/nowhere"
    config = AttentionConfig(layers=(MLA, EXPANDED))
    assert [r.kind for r in FlashInferMLABackend.build_reasons(config, "prefill")] == [0, 1]
    assert [r.kind for r in FlashInferMLABackend.build_reasons(config, "decode")] == [0]


def test_the_generators_are_called_as_the_library_declares_them(fake: FakeFlashInfer) -> None:
    text = source(FLASHINFER, "flashinfer/jit/attention/modules.py")
    modules = {
        "gen_batch_mla_module": Module("bfloat16", "fp8_e4m3", 576, 512, False, False, "mla_fa3"),
        "_gen_batch_prefill_primary_module": Module("float16", "auto", 64, 64, True, True, "fa2"),
        "gen_batch_prefill_module": Module("float16", "auto", 192, 128, False, False, "fa3"),
    }
    bound = {name: signature_of(text, name).bind(*arguments(m)).arguments for name, m in modules.items()}
    latent = bound["gen_batch_mla_module"]
    assert (latent["backend"], latent["head_dim_ckv"], latent["head_dim_kpe"]) == ("fa3", 512, 64)
    assert latent["dtype_kv"] == torch.float8_e4m3fn
    heads = bound["_gen_batch_prefill_primary_module"]
    assert (heads["backend"], heads["head_dim_qk"], heads["head_dim_vo"]) == ("fa2", 64, 64)
    assert (heads["use_sliding_window"], heads["use_logits_soft_cap"]) == (True, True)
    core = source(FLASHINFER, "flashinfer/jit/core.py")
    assert "def is_aot" in core
    assert "def is_compiled" in core
    assert 'os.environ.get("FLASHINFER_DISABLE_JIT")' in core
