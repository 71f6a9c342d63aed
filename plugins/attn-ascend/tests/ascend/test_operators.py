"""Which operators are found, how they are called by each version, and what is said where torch-npu does not load."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attn_ascend import operators
from attn_ascend.operators import Operators, load
from attn_ascend.writing import write
from attn_core.errors import KernelError, PluginLoadError

from .calls import BLOCKS, SIZE, floats, table
from .steps import kind_of, mla_kind, scene


def test_no_operator_is_found_where_torch_npu_is_not() -> None:
    lookalike = SimpleNamespace(npu=SimpleNamespace(), atb=SimpleNamespace())
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ops", lookalike)
        assert Operators.here() == Operators(0, False, False, False, False, False)


#: As the wheel of torch-npu 2.9.0 has it: for caches in NZ format alone.
OLD_SCATTER = (
    "npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None,"
    " Tensor? seq_lens=None) -> ()"
)


@pytest.mark.parametrize(("schema", "usable"), [
    (OLD_SCATTER, False), (OLD_SCATTER.replace("seq_lens=None)", 'seq_lens=None, str? cache_mode="PA_NZ")'), True),
])  # fmt: skip
def test_a_cache_write_that_cannot_be_told_the_format_is_not_used(
    schema: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scatter = SimpleNamespace(default=SimpleNamespace(_schema=torch._C.parse_schema(schema)))
    npu = SimpleNamespace(npu_scatter_pa_kv_cache=scatter)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(npu=npu, atb=SimpleNamespace()))
    assert Operators.here().scatter is usable


@pytest.mark.usefixtures("emulated")
def test_the_newest_operators_are_taken_where_all_are_here() -> None:
    assert load("cpu") == Operators(2, True, True, True, True, True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_take_what_they_share(version: int) -> None:
    here = replace(Operators.here(), fused=version)
    cache = floats(BLOCKS, SIZE, 128)
    named = {"block_table": table(), "block_size": SIZE, "input_layout": "BSND", "actual_seq_kvlen": [200, 130]}
    named |= {"num_query_heads": 8, "num_key_value_heads": 2, "softmax_scale": 0.1}
    out, lse = here.fused_attention(floats(2, 1, 8, 64), cache, cache, return_softmax_lse=True, **named)
    assert (tuple(out.shape), tuple(lse.shape)) == ((2, 1, 8, 64), (2, 8, 1, 1))


def test_version_1_has_no_sink() -> None:
    assert not Operators(1, True, True, True, True, True).takes_sinks
    assert Operators(2, True, True, True, True, True).takes_sinks


@pytest.mark.usefixtures("emulated")
def test_what_an_operator_rejects_is_a_kernel_error_with_its_cause() -> None:
    with pytest.raises(KernelError, match=r"npu_fused_infer_attention_score_v2.*\[dtype\]"):
        Operators.here().fused_attention(torch.randn(2, 1, 8, 64), floats(6, 128, 128), floats(6, 128, 128),
                                         input_layout="BSND", num_query_heads=8)  # fmt: skip


def test_torch_npu_that_does_not_load_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(PluginLoadError, match="torch-npu does not load") as caught:
        load("npu")
    assert "set_env.sh" in (caught.value.hint or "")


def test_torch_npu_without_a_card_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    with pytest.raises(PluginLoadError, match="sees no NPU"):
        load("npu")


def test_torch_npu_with_a_card_gives_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    assert load("npu") == Operators.here()


def test_another_device_is_refused() -> None:
    with pytest.raises(PluginLoadError, match="runs on an NPU"):
        load("cuda")
    assert operators.emulated is False


WRITES = {
    "ATB": {},
    "aclnn": {"write": False, "write_latent": False},
    "plain torch": {"write": False, "write_latent": False, "scatter": False},
}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("kind", [kind_of(4, 2, 64), mla_kind(4)], ids=["MHA", "MLA"])
def test_every_way_to_write_touches_the_named_slots_and_no_other(kind: object, way: str) -> None:
    found = scene(kind, (3, 2), (130, 2))  # type: ignore[arg-type]
    slots = found.batch.slot_mapping.to(torch.int32)
    slots[1] = -1
    before = found.cache.k(0).clone()
    write(replace(Operators.here(), **WRITES[way]), found.cache, found.layer, found.k, found.v, slots)
    after = found.cache.k_nhd(0).flatten(0, 1)
    kept = slots >= 0
    assert torch.equal(after[slots[kept].long()], found.k[kept])
    untouched = torch.ones(after.shape[0], dtype=torch.bool)
    untouched[slots[kept].long()] = False
    old = before.view(after.shape)
    assert torch.equal(after[untouched].view(torch.int16), old[untouched].view(torch.int16))


@pytest.mark.usefixtures("emulated")
def test_writing_nothing_calls_nothing() -> None:
    found = scene(kind_of(4, 2, 64), (3,), (130,))
    write(Operators.here(), found.cache, found.layer, found.k[:0], found.v[:0], torch.empty(0, dtype=torch.int32))  # type: ignore[index]
