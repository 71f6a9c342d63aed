"""From a plan to what runs: what is constructed, what the installed builds may refuse, and which cache fits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from attn_core.errors import BackendRefusedError, ConfigError, NoBackendError, PluginLoadError, UsageError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.discovery import Installed
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.build import build, settle
from attn_core.runtime.conversion import PageTableConversion
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.torch_native.backend import TorchNativeBackend

from .scenes import GQA3, planned, ref

CONFIG = AttentionConfig((replace(GQA3, layer_ids=(0, 1)),), dtype="float32", page_size=16)


class Counted(TorchNativeBackend):
    """Counts its instances and remembers what it was given."""

    made: ClassVar[list[TorchNativeBackend]] = []

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        Counted.made.append(self)


class Other(TorchNativeBackend):
    pass


class NoSoftcapDecode(TorchNativeBackend):
    """A build without decode."""

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        if phase != "decode":
            return ()
        return (reason("build_unsupported", "softcap", "30.0", "compiled out"),)


class Nothing(TorchNativeBackend):
    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        return (reason("build_unsupported", "anything", "something", "nothing"),)


class Fails(TorchNativeBackend):
    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        raise RuntimeError("CUDA driver version is insufficient")


class AsksBadly(TorchNativeBackend):
    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        raise AttributeError("module 'kernels' has no attribute 'CONFIG'")


@pytest.fixture(autouse=True)
def _forget() -> None:
    Counted.made.clear()


def cache_for(config: AttentionConfig) -> KVCache:
    return KVCache.allocate(config, num_pages=4)


def test_what_is_no_plan_is_not_built() -> None:
    with pytest.raises(UsageError, match="AttentionConfig") as caught:
        build(CONFIG, cache_for(CONFIG.replace(kv_layout="NHD")))  # type: ignore[arg-type]
    assert caught.value.accepted == "what attn_core.plan(config) gives"


def test_one_instance_serves_every_phase() -> None:
    plan = planned(CONFIG.replace(speculative_num_draft_tokens=4), ref("counted", Counted))
    built = build(plan, cache_for(plan.config))
    assert len(Counted.made) == 1
    assert set(built.backends) == {"prefill", "decode", "verify", "draft"}
    assert set(built.backends.values()) == {Counted.made[0]}
    assert built.plan is plan
    assert Counted.made[0].kv_cache is built.kv_cache


def test_each_phase_gets_its_backend() -> None:
    plan = planned(
        CONFIG, ref("counted", Counted), ref("other", Other), backend={"prefill": "counted", "decode": "other"}
    )
    built = build(plan, cache_for(plan.config))
    assert type(built.backends["prefill"]) is Counted
    assert type(built.backends["decode"]) is Other


def test_a_plan_of_some_phases_builds_those() -> None:
    plan = planned(CONFIG, ref("counted", Counted), phases=("decode",))
    assert set(build(plan, cache_for(plan.config)).backends) == {"decode"}


def test_nothing_that_was_not_chosen_is_imported() -> None:
    idle = ref("idle", None, object_="idle_plugin_that_is_not_there:Backend")
    plan = planned(CONFIG, ref("counted", Counted), idle, backend="counted")
    build(plan, cache_for(plan.config))
    assert "idle_plugin_that_is_not_there" not in sys.modules


def test_pages_it_has_not_are_converted_without_a_copy() -> None:
    plan = planned(CONFIG, ref("small", Counted, page_sizes=[1, 4]))
    built = build(plan, cache_for(plan.config))
    wrapped = built.backends["decode"]
    assert isinstance(wrapped, PageTableConversion)
    assert wrapped is built.backends["prefill"], "one instance for both phases"
    (inner,) = Counted.made
    assert (inner.kv_cache.page_size, inner.config.page_size) == (4, 4)
    assert inner.kv_cache.k(1).data_ptr() == built.kv_cache.k(1).data_ptr()
    assert built.config.page_size == 16


# -- what the installed build cannot do


def test_a_named_backend_whose_build_cannot_is_refused() -> None:
    refs = ref("lacking", NoSoftcapDecode), ref("other", Other)
    plan = planned(CONFIG, *refs, backend="lacking")
    with pytest.raises(
        BackendRefusedError, match="the installed build of backend 'lacking' cannot run decode"
    ) as caught:
        build(plan, cache_for(plan.config), installed=Installed(refs))
    assert "build_unsupported: softcap 30.0, accepted: compiled out" in str(caught.value)


def test_auto_plans_again_without_it_and_the_trace_says_why() -> None:
    refs = ref("a_lacking", NoSoftcapDecode), ref("other", Other)
    plan = planned(CONFIG, *refs)
    assert {phase.backend.name for phase in plan.phases.values()} == {"a_lacking"}
    built = build(plan, cache_for(plan.config), installed=Installed(refs))
    assert built.plan.phases["decode"].backend.name == "other"
    row = next(row for row in built.plan.trace["decode"] if row.listed == "a_lacking")
    assert row.status == "refused"
    assert [r.code for r in row.reasons] == ["build_unsupported"]
    assert type(built.backends["decode"]) is Other
    assert (built.plan.config.page_size, built.plan.config.kv_layout) == (plan.config.page_size, plan.config.kv_layout)


def test_a_phase_that_was_named_stays_when_another_is_planned_again() -> None:
    refs = ref("a_lacking", NoSoftcapDecode), ref("counted", Counted), ref("other", Other)
    plan = planned(CONFIG, *refs, backend={"prefill": "other"})
    settled = settle(plan, installed=Installed(refs))
    assert settled.phases["prefill"].backend.name == "other"
    assert settled.phases["decode"].backend.name != "a_lacking"


def test_a_fallback_of_a_named_backend_is_not_exchanged() -> None:
    decoder = ref("decoder", Counted, phases=["decode"], fallback={"prefill": ["lacking"]})
    lacking = ref("lacking", Nothing)
    plan = planned(CONFIG, decoder, lacking, ref("other", Other), backend="decoder", fallback="allow")
    with pytest.raises(BackendRefusedError, match="'lacking' cannot run prefill"):
        settle(plan)


def test_auto_that_runs_out_of_backends_says_so() -> None:
    refs = ref("a", Nothing), ref("b", Nothing)
    with pytest.raises(NoBackendError, match="no backend can run") as caught:
        settle(planned(CONFIG, *refs), installed=Installed(refs))
    assert "a: refused: build_unsupported" in str(caught.value)


def test_a_plan_that_stands_is_returned_as_it_is() -> None:
    plan = planned(CONFIG, ref("counted", Counted))
    assert settle(plan) is plan


def test_build_reasons_are_asked_of_the_pages_it_is_given() -> None:
    seen: list[tuple[Any, Phase]] = []

    class Asked(TorchNativeBackend):
        @classmethod
        def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
            seen.append((config.page_size, phase))
            return ()

    plan = planned(CONFIG, ref("asked", Asked, page_sizes=[8]))
    settle(plan)
    assert seen == [(8, "prefill"), (8, "decode")]


# -- faults of a plugin, and caches that do not fit


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Fails, "constructing it failed: RuntimeError: CUDA driver version is insufficient"),
        (AsksBadly, "asking its build_reasons failed: AttributeError"),
    ],
)
def test_a_backend_that_fails_while_it_is_built(cls: type[AttentionBackend], message: str) -> None:
    plan = planned(CONFIG, ref("failing", cls))
    with pytest.raises(PluginLoadError, match=message):
        build(plan, cache_for(plan.config))


MISFITS: list[tuple[str, dict[str, Any]]] = [
    ("another page size", {"page_size": 8}),
    ("another layout", {"kv_layout": "HND"}),
    ("another dtype", {"dtype": "bfloat16"}),
    ("a missing layer", {"layers": (replace(GQA3, layer_ids=(0,)),)}),
    ("other heads", {"layers": (replace(GQA3, num_q_heads=4, num_kv_heads=4, layer_ids=(0, 1)),)}),
    ("another width", {"layers": (replace(GQA3, v_head_dim=16, layer_ids=(0, 1)),)}),
]


@pytest.mark.parametrize(("why", "changes"), MISFITS, ids=[row[0] for row in MISFITS])
def test_a_cache_that_is_not_what_was_planned_is_refused(why: str, changes: dict[str, Any]) -> None:
    plan = planned(CONFIG, ref("counted", Counted))
    with pytest.raises(ConfigError, match="cache"):
        build(plan, cache_for(plan.config.replace(**changes)))
    assert not Counted.made


def test_mla_caches_are_compared_too() -> None:
    kind = LayerKind(4, 1, 40, 32, kind="mla", scale=0.2, layer_ids=(0,))
    config = AttentionConfig((kind,), dtype="float32")
    plan = planned(config, ref("latent", Counted, kind="mla", kv_layouts=["MLA"]))
    build(plan, cache_for(plan.config))
    wider = plan.config.replace(layers=(replace(kind, qk_head_dim=48),))
    with pytest.raises(ConfigError, match="a cache of"):
        build(plan, cache_for(wider))


def test_the_real_plan_of_this_machine_builds_and_runs() -> None:
    from attn_core import plan as make_plan

    made = make_plan(CONFIG, "torch_native")
    built = build(made, cache_for(made.config))
    assert type(built.backends["decode"]) is TorchNativeBackend
    assert torch.equal(built.kv_cache.k(0), torch.zeros_like(built.kv_cache.k(0)))
