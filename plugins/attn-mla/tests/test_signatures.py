"""Every call that our code makes is one that the real libraries take: bound against the wheels' own sources."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.layer import AttentionLayer
from attn_mla.flashmla import FlashMLABackend
from attn_mla.trtllm import TRTLLMMLABackend
from fake_mla_libraries import FakeLibraries
from real_wheel import signature_of, source
from test_decode import STEPS, batch_of, config_of, queries, random_cache

FLASH_MLA = "sgl-flash-mla==1.0.0"
FLASHINFER = "flashinfer-python==0.7.2.post1"
MEMBERS = {
    "flashmla": (FLASH_MLA, "flash_mla/flash_mla_interface.py", "flash_mla_with_kvcache"),
    "trtllm": (FLASHINFER, "flashinfer/mla/_core.py", "trtllm_batch_decode_with_kv_cache_mla"),
}


def real(name: str) -> inspect.Signature:
    requirement, member, function = MEMBERS[name]
    return signature_of(source(requirement, member), function)


@pytest.mark.parametrize("cls", [FlashMLABackend, TRTLLMMLABackend])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_every_call_binds(
    fake: FakeLibraries, cls: type[AttentionBackend], step: str, given_out: bool, return_lse: bool, kv_dtype: str
) -> None:
    config, batch = config_of(kv_cache_dtype=kv_dtype), batch_of(*STEPS[step])
    backend, layer = cls(config, random_cache(config)), AttentionLayer.of_kind(config.layers[0], 0)
    q = queries(batch)
    out = torch.empty(q.shape[0], 4, 512, dtype=q.dtype) if given_out else None
    backend.init_forward_metadata(batch)
    backend.forward(q, None, None, layer, batch, return_lse=return_lse, out=out)
    (call,) = fake.calls
    name, arguments = call
    given = signature_of_stand_in(fake, name)
    passed = {k: v for k, v in arguments.items() if given.parameters[k].default is not v}
    real(name).bind(**passed)


def signature_of_stand_in(fake: FakeLibraries, name: str) -> inspect.Signature:
    modules = fake.modules()
    function = {
        "flashmla": modules["flash_mla"].flash_mla_with_kvcache,
        "trtllm": modules["flashinfer.mla"].trtllm_batch_decode_with_kv_cache_mla,
    }[name]
    return inspect.signature(function)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_stand_in_takes_nothing_that_the_library_does_not(fake: FakeLibraries, name: str) -> None:
    assert set(signature_of_stand_in(fake, name).parameters) <= set(real(name).parameters)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_changed_signature_would_fail(fake: FakeLibraries, name: str) -> None:
    """The check is a real one: a call with an argument that the library lacks does not bind."""
    arguments = dict.fromkeys(signature_of_stand_in(fake, name).parameters)
    real(name).bind(**arguments)
    with pytest.raises(TypeError, match="unexpected keyword"):
        real(name).bind(**arguments, not_an_argument=None)


def test_the_schedule_of_the_fp8_kernel_binds_and_goes_where_the_kernel_looks_for_it(fake: FakeLibraries) -> None:
    interface = source(FLASH_MLA, "flash_mla/flash_mla_interface.py")
    signature_of(interface, "get_mla_decoding_metadata").bind(None, 16, 1, is_fp8_kvcache=True, use_legacy=True)
    assert (
        "sched_meta.tile_scheduler_metadata, sched_meta.num_splits,\n                descale_q, descale_k" in interface
    )


def test_the_schedule_is_one_object_and_the_builds_halves_can_be_told_apart() -> None:
    interface = source(FLASH_MLA, "flash_mla/flash_mla_interface.py")
    assert "return FlashMLASchedMeta(), None" in interface
    assert "def has_legacy" in source(FLASH_MLA, "flash_mla/_loader.py")


def test_the_committed_evidence_is_what_binding_gives(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    tool = root / "plugins" / "attn-mla" / "tools" / "schema_evidence.py"
    subprocess.run([sys.executable, tool, tmp_path], check=True, capture_output=True, timeout=120)
    (written,) = tmp_path.rglob("trtllm_mla.json")
    committed = root / "evidence" / written.relative_to(tmp_path)
    found, kept = (json.loads(path.read_text()) for path in (written, committed))
    # the code that ran is edited more often than what it binds; the matrix says which code a run proved
    assert set(found["code"]) == set(kept["code"]) == {"attn-core", "attn-mla"}
    assert {**found, "date": None, "code": None} == {**kept, "date": None, "code": None}
    assert found["level"] == "schema"
