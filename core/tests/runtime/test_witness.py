"""What ran is what is seen: through routers and conversions, through a quiet change of backend, only while watched."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.build import build
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.runtime.witness import Witness

from .scenes import GQA3, assert_right, native, planned, ref, scene


class Honest(TorchNativeBackend):
    name = "honest"

    def forward_decode(self, *args: Any, **options: Any) -> Any:
        return super().forward_decode(*args, **options)


class HandsItOn(TorchNativeBackend):
    """Claims to decode, and lets another do it."""

    name = "hands_it_on"

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **options: Any) -> Any:
        other = Secret(self.config, self.kv_cache)
        inner = replace(batch, plan_state=None)
        other.init_forward_metadata(inner)
        return other.forward(q, k, v, layer, inner, **options)


class Secret(TorchNativeBackend):
    name = "secret"


def test_each_phase_is_seen_with_the_name_it_was_planned_by() -> None:
    made = scene(GQA3, ForwardMode.MIXED, query_lens=[1, 4], seq_lens=[20, 4])
    refs = ref("first", TorchNativeBackend), ref("second", Honest, page_sizes=[4])
    router = build(planned(made.config, *refs, backend={"prefill": "first", "decode": "second"}), made.cache)
    with Witness(router) as witness:
        assert_right(made.run(witness.backend), made.expected())
    assert witness.by_phase() == {"decode": ("second",), "prefill": ("first",)}
    assert witness.names == ("second", "first")
    assert {sighting.cls.rpartition(".")[2] for sighting in witness.sightings} == {"Honest", "TorchNativeBackend"}


def test_a_backend_that_hands_its_work_on_is_seen_as_both() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    router = build(planned(made.config, ref("claimed", HandsItOn)), made.cache)
    with Witness(router) as witness:
        made.run(witness.backend)
    assert witness.names == ("claimed", "secret")


def test_a_bare_backend_goes_by_its_own_name() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    with Witness(native(made)) as witness:
        made.run(witness.backend)
        made.run(witness.backend)
    assert witness.by_phase() == {"decode": ("torch_native",)}
    assert set(witness.counts.values()) == {2}


def test_an_uncut_mixed_step_is_both_phases() -> None:
    made = scene(GQA3, ForwardMode.MIXED, query_lens=[1, 4], seq_lens=[20, 4])
    with Witness(native(made)) as witness:
        made.run(witness.backend)
    assert set(witness.by_phase()) == {"decode", "prefill"}


def test_ragged_calls_are_prefill() -> None:
    made = scene(GQA3, query_lens=[3], seq_lens=[3])
    starts = torch.tensor([0, 3])
    with Witness(native(made)) as witness:
        witness.backend.forward_ragged(
            made.q, made.k, made.v, made.layer,
            query_start_loc=starts, key_start_loc=starts, max_query_len=3, max_key_len=3, causal=True,
        )  # fmt: skip
    assert witness.by_phase() == {"prefill": ("torch_native",)}


def test_graphs_and_writes_pass_through() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1, 1], seq_lens=[20, 4])
    with Witness(native(made)) as witness:
        backend = witness.backend
        backend.write_kv(made.k, made.v, made.layer, made.batch.slot_mapping)
        backend.init_cuda_graph_state(2, 2)
        batch = replace(made.batch)
        backend.init_forward_metadata_capture_cuda_graph(batch)
        backend.init_forward_metadata_replay_cuda_graph(batch)
        backend.warmup(made.config)
        assert_right(backend.forward(made.q, None, None, made.layer, batch, save_kv_cache=False), made.expected())
    assert witness.names == ("torch_native",)


def test_calls_around_the_witness_are_not_its_business() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    backend = native(made)
    with Witness(backend) as witness:
        made.run(backend)
    assert witness.names == ()


def test_two_witnesses_see_their_own() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    with Witness(native(made)) as first, Witness(Honest(made.config, made.cache)) as second:
        made.run(first.backend)
        made.run(second.backend)
    assert (first.names, second.names) == (("torch_native",), ("honest",))


def test_without_a_witness_the_classes_are_as_they_were() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    gc.collect()  # witnesses that other tests forgot
    originals = dict(vars(TorchNativeBackend))
    witness = Witness(native(made))
    assert vars(TorchNativeBackend)["forward_decode"] is not originals["forward_decode"]
    witness.close()
    witness.close()
    assert dict(vars(TorchNativeBackend)) == originals
    forgotten = Witness(native(made))
    del forgotten
    gc.collect()
    assert dict(vars(TorchNativeBackend)) == originals


def test_what_was_put_in_place_of_a_forward_meanwhile_stays() -> None:
    """A fault that is planted while a witness exists is still there when the witness is gone."""

    class Target(Honest):
        def forward_decode(self, *args: Any, **options: Any) -> Any:
            return super().forward_decode(*args, **options)

    def planted(self: Any, *args: Any, **options: Any) -> Any:
        raise AssertionError("planted")

    with Witness(native(scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20]))):
        Target.forward_decode = planted  # type: ignore[method-assign]
    assert vars(Target)["forward_decode"] is planted
