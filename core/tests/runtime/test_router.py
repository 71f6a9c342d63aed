"""One protocol over several backends: who runs which batch, mixed steps in two parts, refusing what was not planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import AttnError, BatchError, ConfigError, RequestTooLongError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.runtime.witness import Witness
from torch import Tensor

from .scenes import GQA3, Scene, assert_right, native, planned, ref, scene

FEATURES = [
    "sliding_window", "softcap", "sinks", "lse", "verify_chain", "verify_tree", "bidirectional_spans", "cross",
    "ragged", "cuda_graph",
]  # fmt: skip
MODES: dict[ForwardMode, tuple[list[int], list[int]]] = {
    ForwardMode.EXTEND: ([5, 3], [21, 3]),
    ForwardMode.DECODE: ([1, 1], [21, 3]),
    ForwardMode.TARGET_VERIFY: ([4, 4], [21, 4]),
    ForwardMode.DRAFT_EXTEND: ([2, 1], [21, 3]),
}


class Prefills(TorchNativeBackend):
    cuda_graph_seq_len_fill_value = 0


class Decodes(TorchNativeBackend):
    cuda_graph_seq_len_fill_value = 1


class Verifies(TorchNativeBackend):
    pass


class Drafts(TorchNativeBackend):
    pass


CLASSES: dict[Phase, type[TorchNativeBackend]] = {
    "prefill": Prefills, "decode": Decodes, "verify": Verifies, "draft": Drafts,
}  # fmt: skip


def routed(
    made: Scene,
    phases: tuple[Phase, ...] = ("prefill", "decode", "verify", "draft"),
    role: Any = "target",
    **serving: Any,
) -> PhaseRouter:
    """A router with a backend of its own for each phase, over the scene's cache."""
    config = made.config.replace(**{"lse": True, "speculative_num_draft_tokens": 4, **serving})
    refs = [ref(phase, CLASSES[phase], features=FEATURES) for phase in phases]
    plan = planned(config, *refs, backend={phase: phase for phase in phases}, phases=phases)
    return build(plan, made.cache, role=role)


def ran(made: Scene, router: PhaseRouter) -> tuple[Any, dict[Phase, tuple[str, ...]]]:
    with Witness(router) as witness:
        result = made.run(witness.backend, return_lse=True)
    return result, witness.by_phase()


@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        (ForwardMode.EXTEND, "prefill"),
        (ForwardMode.DECODE, "decode"),
        (ForwardMode.TARGET_VERIFY, "verify"),
        (ForwardMode.DRAFT_EXTEND, "draft"),
    ],
)
def test_a_batch_goes_to_the_backend_of_its_phase(mode: ForwardMode, phase: Phase) -> None:
    query_lens, seq_lens = MODES[mode]
    made = scene(GQA3, mode, query_lens=query_lens, seq_lens=seq_lens)
    result, seen = ran(made, routed(made))
    assert seen == {phase: (phase,)}
    assert_right(result, made.expected())


def test_the_decodes_of_a_draft_model_are_drafts() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1, 1], seq_lens=[21, 3])
    assert ran(made, routed(made, role="draft"))[1] == {"draft": ("draft",)}


def test_a_tree_reaches_the_verifying_backend() -> None:
    tree = TreeMask.from_parents(torch.tensor([[-1, 0, 0, 1]] * 2))
    made = scene(GQA3, ForwardMode.TARGET_VERIFY, query_lens=[4, 4], seq_lens=[21, 4], tree=tree)
    result, seen = ran(made, routed(made, speculative_eagle_topk=2))
    assert seen == {"verify": ("verify",)}
    assert_right(result, made.expected())


MIXES = [([1, 1, 6, 18], [20, 1, 6, 30]), ([6, 1], [6, 30]), ([1, 1], [20, 9])]


@pytest.mark.parametrize(("query_lens", "seq_lens"), MIXES)
@pytest.mark.parametrize("kind", [GQA3, replace(GQA3, sinks=True, sliding_window=9)], ids=["plain", "sinks"])
def test_a_mixed_step_runs_in_two_parts_into_one_output(
    kind: LayerKind, query_lens: list[int], seq_lens: list[int]
) -> None:
    made = scene(kind, ForwardMode.MIXED, query_lens=query_lens, seq_lens=seq_lens)
    result, seen = ran(made, routed(made))
    decodes = made.batch.num_decodes
    assert ("decode" in seen) == (decodes > 0)
    assert ("prefill" in seen) == (decodes < len(seq_lens))
    assert all(names == (phase,) for phase, names in seen.items())
    assert_right(result, made.expected())


def test_a_mixed_step_fills_the_engines_output() -> None:
    made = scene(GQA3, ForwardMode.MIXED, query_lens=[1, 6], seq_lens=[20, 6])
    out = torch.full((7, 6, 32), float("nan"))
    assert made.run(routed(made), out=out) is out
    assert_right(out, made.expected())


def test_a_mixed_step_is_not_cut_for_a_backend_that_runs_both_parts() -> None:
    made = scene(GQA3, ForwardMode.MIXED, query_lens=[1, 6], seq_lens=[20, 6])
    plan = planned(made.config, ref("one", TorchNativeBackend))
    router = build(plan, made.cache)
    seen: list[ForwardMode] = []
    inner = router.backends["prefill"]
    inner.init_forward_metadata, kept = (  # type: ignore[method-assign]
        lambda batch: (seen.append(batch.mode), kept(batch))[1], inner.init_forward_metadata,
    )  # fmt: skip
    assert_right(made.run(router), made.expected())
    assert seen == [ForwardMode.MIXED]


def test_a_mixed_cross_layer_writes_the_encoder_once_for_both_parts() -> None:
    crossing = replace(GQA3, cross=True)
    made = scene(
        crossing, ForwardMode.MIXED, query_lens=[1, 6], seq_lens=[20, 6], encoder_lens=[17, 9]
    )  # fmt: skip
    result, seen = ran(made, routed(made))
    assert set(seen) == {"decode", "prefill"}
    assert_right(result, made.expected())


def test_several_batches_of_several_backends_are_in_flight() -> None:
    first = scene(GQA3, ForwardMode.MIXED, query_lens=[1, 6], seq_lens=[20, 6])
    router = routed(first)
    wanted = first.run(router).clone()
    a, b = replace(first.batch, plan_state=None), replace(first.batch, plan_state=None)
    router.init_forward_metadata(a)
    b.seq_lens = b.seq_lens - torch.tensor([1, 0], dtype=torch.int32)
    b.seq_lens_cpu = None
    router.init_forward_metadata(b)
    assert torch.equal(router.forward(first.q, first.k, first.v, first.layer, a), wanted)


def test_idle_steps_need_no_backend() -> None:
    made = scene(GQA3, ForwardMode.IDLE, query_lens=[], seq_lens=[])
    assert made.run(routed(made, phases=("decode",))).shape == (0, 6, 32)


def test_write_kv_reaches_the_cache() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1, 1], seq_lens=[21, 3])
    router = routed(made)
    router.write_kv(made.k, made.v, made.layer, made.batch.slot_mapping)
    made.k = made.v = None
    assert_right(made.run(router, save_kv_cache=False), made.expected())


def test_a_padded_length_is_one_that_every_graphed_backend_takes() -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[1])
    assert routed(made).cuda_graph_seq_len_fill_value == 1
    assert routed(made, phases=("prefill", "verify"), speculative_num_draft_tokens=4).cuda_graph_seq_len_fill_value == 0


def test_warmup_reaches_each_backend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[1])
    router = routed(made)
    warmed: list[type] = []
    monkeypatch.setattr(TorchNativeBackend, "warmup", lambda self, config: warmed.append(type(self)))
    router.warmup(router.config)
    assert sorted(cls.__name__ for cls in warmed) == ["Decodes", "Drafts", "Prefills", "Verifies"]


# -- what was not planned


def test_a_phase_that_was_not_planned_is_refused() -> None:
    made = scene(GQA3, ForwardMode.TARGET_VERIFY, query_lens=[4], seq_lens=[4])
    router = routed(made, phases=("prefill", "decode"))
    with pytest.raises(BatchError, match="nothing is planned for verify"):
        made.run(router)


UNPLANNED_LAYERS: list[tuple[str, Callable[[AttentionLayer], object], str]] = [
    ("a soft cap", lambda layer: setattr(layer, "softcap", 30.0), "softcap 30.0, planned as 0.0"),
    ("a window", lambda layer: setattr(layer, "sliding_window", 8), "sliding_window 8, planned as None"),
    ("sinks", lambda layer: setattr(layer, "sinks", torch.zeros(6)), "sinks given, planned as sinks=False"),
    ("a scale", lambda layer: setattr(layer, "scale", 1.0), "scale 1.0, planned as 0.17"),
    ("cross", lambda layer: setattr(layer, "cross", True), "cross True, planned as False"),
    ("more heads", lambda layer: setattr(layer, "num_q_heads", 8), "num_q_heads 8, planned as 6"),
    ("a width", lambda layer: setattr(layer, "v_head_dim", 16), "v_head_dim 16, planned as 32"),
    ("latents", lambda layer: setattr(layer, "kind", "mla"), "kind mla, planned as mha"),
    (
        "scales without fp8",
        lambda layer: setattr(layer, "k_scale", 0.5),
        "scales 0.5, 1.0 with a cache of torch.float32",
    ),
    ("an unknown layer", lambda layer: setattr(layer, "layer_id", 7), "layer 7 is of no layer kind"),
]


@pytest.mark.parametrize(("why", "change", "message"), UNPLANNED_LAYERS, ids=[row[0] for row in UNPLANNED_LAYERS])
def test_a_layer_that_is_not_as_planned_is_refused(
    why: str, change: Callable[[AttentionLayer], object], message: str
) -> None:
    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE):
        made = scene(GQA3, mode, query_lens=[1], seq_lens=[9])
        change(made.layer)
        with pytest.raises(ConfigError, match=message):
            made.run(routed(made))


def test_queries_of_another_dtype_are_refused() -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[9])
    made.q = made.q.bfloat16()
    with pytest.raises(ConfigError, match=r"queries of torch\.bfloat16, planned as float32"):
        made.run(routed(made))


@pytest.mark.parametrize(
    ("cut", "shape"),
    [
        (lambda q: q[:, :3], r"\[1, 3, 32\]"),  # as many as KV heads: each its own group, and no error further down
        (lambda q: q[..., :16], r"\[1, 6, 16\]"),
        (lambda q: q.flatten(1), r"\[1, 192\]"),
    ],
)
def test_queries_of_other_heads_are_refused(cut: Callable[[Tensor], Tensor], shape: str) -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[9])
    made.q = cut(made.q)
    with pytest.raises(ConfigError, match=rf"queries {shape}, planned as \[tokens, 6, 32\]"):
        made.run(routed(made))


def test_a_layer_is_looked_at_again_when_it_is_another() -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[9])
    router = routed(made)
    made.run(router)
    made.layer = replace(made.layer, softcap=3.0)
    with pytest.raises(ConfigError, match="softcap"):
        made.run(router)


def test_an_lse_that_was_not_planned_is_refused() -> None:
    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE):
        made = scene(GQA3, mode, query_lens=[1], seq_lens=[9])
        with pytest.raises(ConfigError, match="no LSE is planned"):
            made.run(routed(made, lse=False), return_lse=True)


UNPLANNED_BATCHES: list[tuple[str, ForwardMode, dict[str, Any], dict[str, Any], type[AttnError], str]] = [
    (
        "a tree where chains are planned", ForwardMode.TARGET_VERIFY,
        {"tree": TreeMask.from_parents(torch.tensor([[-1, 0]]))}, {}, BatchError, "a tree of draft tokens",
    ),
    ("spans", ForwardMode.EXTEND, {"spans": [[(0, 2)]]}, {}, BatchError, "bidirectional spans"),
    ("more drafts", ForwardMode.TARGET_VERIFY, {}, {"speculative_num_draft_tokens": 1}, BatchError, "2 draft tokens"),
    ("a longer context", ForwardMode.EXTEND, {}, {"max_context_len": 8}, RequestTooLongError, "a sequence of 9 tokens"),
]  # fmt: skip


@pytest.mark.parametrize("case", UNPLANNED_BATCHES, ids=[row[0] for row in UNPLANNED_BATCHES])
def test_a_step_that_asks_for_more_than_was_planned_is_refused(case: Any) -> None:
    _, mode, batch, serving, error, message = case
    made = scene(GQA3, mode, query_lens=[2], seq_lens=[9], **batch)
    with pytest.raises(error, match=message):
        made.run(routed(made, **serving))


def test_spans_that_were_planned_run() -> None:
    made = scene(GQA3, query_lens=[9], seq_lens=[9], spans=[[(0, 4)]])
    assert_right(made.run(routed(made, bidirectional_spans=True)), made.expected())


def test_given_keys_and_cached_keys_are_not_exchanged() -> None:
    tower = replace(GQA3, ragged=True, causal=False, layer_ids=(5,))
    made = scene(GQA3, query_lens=[3], seq_lens=[3])
    config = made.config.replace(layers=(*made.config.layers, tower))
    plan = planned(config, ref("one", TorchNativeBackend, features=FEATURES))
    router = build(plan, made.cache)
    seeing = AttentionLayer.of_kind(tower, 5)
    starts = torch.tensor([0, 3])
    bounds = {"query_start_loc": starts, "key_start_loc": starts, "max_query_len": 3, "max_key_len": 3}
    given = router.forward_ragged(made.q, made.k, made.v, seeing, causal=False, **bounds)
    assert torch.equal(given, native(made).forward_ragged(made.q, made.k, made.v, seeing, causal=False, **bounds))
    with pytest.raises(ConfigError, match="called with given keys, planned as ragged=False"):
        router.forward_ragged(made.q, made.k, made.v, made.layer, causal=False, **bounds)
    made.layer = seeing
    with pytest.raises(ConfigError, match="called over the cache, planned as ragged=True"):
        made.run(router)
    with pytest.raises(ConfigError, match="no LSE is planned"):
        router.forward_ragged(made.q, made.k, made.v, seeing, causal=False, return_lse=True, **bounds)


def test_graphs_that_were_not_planned_are_refused() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[9])
    with pytest.raises(ConfigError, match="graphs were not planned"):
        routed(made).init_cuda_graph_state(1, 1)


def test_graph_functions_reach_the_backend_of_the_mode() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1, 1], seq_lens=[9, 30])
    router = routed(made, cuda_graph=True)
    router.init_cuda_graph_state(2, 8)
    batch = replace(made.batch)
    router.init_forward_metadata_capture_cuda_graph(batch)
    router.init_forward_metadata_replay_cuda_graph(batch)
    assert_right(router.forward(made.q, made.k, made.v, made.layer, batch), made.expected())
    prompt = scene(GQA3, query_lens=[2], seq_lens=[9]).batch
    with pytest.raises(BatchError, match="a graph of EXTEND"):
        router.init_forward_metadata_capture_cuda_graph(prompt)
    with pytest.raises(BatchError, match="no graph of 2 requests in mode TARGET_VERIFY"):
        router.init_forward_metadata_replay_cuda_graph(replace(made.batch, mode=ForwardMode.TARGET_VERIFY))


def test_the_cache_and_config_are_the_plans() -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[1])
    router = routed(made)
    assert isinstance(router.kv_cache, KVCache)
    assert isinstance(router.config, AttentionConfig)
    assert router.config is router.plan.config
    assert isinstance(made.batch, ForwardBatch)
