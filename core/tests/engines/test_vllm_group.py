"""Steps of the layers that share one of vLLM's caches: eager, captured and replayed, apart by phase; without vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from types import ModuleType, SimpleNamespace
from typing import Any

import attn_core
import pytest
import torch
from attn_core.engines.vllm import planning, served
from attn_core.engines.vllm.group import CacheGroup, Step
from attn_core.engines.vllm.served import Served
from attn_core.errors import ConfigError, PlanError
from attn_core.planning.config import LayerKind
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import detect
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.router import PhaseRouter
from attn_core.runtime.torch_native.backend import TorchNativeBackend

from .test_vllm_batches import common

HEADS, KV_HEADS, WIDTH, BLOCK, BLOCKS = 4, 2, 16, 4, 20


class Impl:
    """What the group needs of a layer's implementation."""

    sinks = None

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.router: PhaseRouter | None = None
        self.layer: AttentionLayer | None = None

    def kind_of(self, _: Any) -> LayerKind:
        return LayerKind(HEADS, KV_HEADS, WIDTH, WIDTH, sliding_window=self.window)

    def bind(self, router: PhaseRouter, layer: AttentionLayer) -> None:
        self.router, self.layer = router, layer


@pytest.fixture(autouse=True)
def vllm_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    package, envs = ModuleType("vllm"), ModuleType("vllm.envs")
    envs.VLLM_BATCH_INVARIANT = False  # type: ignore[attr-defined]
    package.envs = envs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    monkeypatch.setattr(planning, "system_here", lambda: detect("cpu"))


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(served, "_announce", texts.append)
    return texts


@pytest.fixture
def graphed() -> Iterator[str]:
    """torch_native under another name, claiming graphs on the CPU, where a replay runs the same code again."""
    text = files("attn_core").joinpath("torch_native.toml").read_text(encoding="utf-8")
    text = text.replace('name = "torch_native"', 'name = "graphed"').replace('"ragged"]', '"ragged", "cuda_graph"]')
    attn_core.register(type("Graphed", (TorchNativeBackend,), {"name": "graphed"}), Manifest.parse(text))
    yield "graphed"
    attn_core.unregister("graphed")


def model(
    backend: str, *, graphs: bool = False, guesses: int = 0, windows: tuple[int | None, ...] = (None, None)
) -> Any:
    """A config of vLLM as far as it is looked at, with a layer for each window."""
    layers = {
        f"layers.{i}": SimpleNamespace(
            impl=Impl(window),
            kv_cache_dtype="auto",
            kv_cache=torch.randn(BLOCKS, BLOCK, KV_HEADS, 2 * WIDTH).transpose(1, 2),
        )
        for i, window in enumerate(windows)
    }
    return SimpleNamespace(
        additional_config={"attn_backend": backend},
        speculative_config=SimpleNamespace(num_speculative_tokens=guesses) if guesses else None,
        compilation_config=SimpleNamespace(
            static_forward_context=layers, cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: graphs)
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8, async_scheduling=False),
        attention_config=SimpleNamespace(mla_prefill_backend=None),
        model_config=SimpleNamespace(
            model="test", dtype=torch.float32, max_model_len=BLOCK * 8, is_mm_prefix_lm=False, use_mla=False
        ),
    )


def step_of(lens: list[int], seq_lens: list[int], *, padded: int = 0) -> Any:
    """Requests over pages of their own, their new tokens at the end."""
    width = 8
    table = torch.zeros(len(lens) + padded, width, dtype=torch.int32)
    slots: list[int] = []
    page = 1
    for b, (new, length) in enumerate(zip(lens, seq_lens, strict=True)):
        pages = list(range(page, page + -(-length // BLOCK)))
        page += len(pages)
        table[b, : len(pages)] = torch.tensor(pages)
        slots += [pages[p // BLOCK] * BLOCK + p % BLOCK for p in range(length - new, length)]
    mapping = torch.tensor(slots + [-1] * padded, dtype=torch.int64)
    return common(lens, seq_lens, padded=padded, block_table_tensor=table, slot_mapping=mapping)


def attend(group: CacheGroup, step: Step, config: Any, inputs: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
    """One layer of the step over this many rows of the inputs."""
    layer = config.compilation_config.static_forward_context[name].impl.layer
    q, k, v = (x[: step.num_tokens] for x in inputs)
    out = step.backend.forward(q, k, v, layer, step.batch)
    assert isinstance(out, torch.Tensor)
    return out


def rows(tokens: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(tokens, HEADS, WIDTH), torch.randn(tokens, KV_HEADS, WIDTH), torch.randn(tokens, KV_HEADS, WIDTH)


def test_layers_get_their_ids_and_the_plan_is_announced_once(announced: list[str]) -> None:
    config = model("torch_native", windows=(8, None, 8))
    whole = Served(config)
    groups = [CacheGroup(whole, names, block_size=BLOCK) for names in (["layers.0", "layers.2"], ["layers.1"])]
    layers = config.compilation_config.static_forward_context
    assert [layers[f"layers.{i}"].impl.layer.layer_id for i in range(3)] == [0, 1, 2]
    assert [layers[f"layers.{i}"].impl.layer.sliding_window for i in range(3)] == [8, None, 8]
    assert [group.router.kv_cache.layer_ids for group in groups] == [(0, 2), (1,)]
    assert len(announced) == 1
    assert "prefill  torch_native" in announced[0]
    assert "2 x mha" in announced[0]


def test_keys_go_to_vllms_memory_and_come_from_it(announced: list[str]) -> None:
    config = model("torch_native")
    group = CacheGroup(Served(config), ["layers.0", "layers.1"], block_size=BLOCK)
    inputs = rows(3)
    attend(group, group.step(step_of([3], [6])), config, inputs, "layers.1")
    cache = config.compilation_config.static_forward_context["layers.1"].kv_cache
    assert torch.equal(cache[1, :, 3, :WIDTH], inputs[1][0])
    assert torch.equal(cache[2, :, :2, WIDTH:], inputs[2][1:].transpose(0, 1))


def test_a_group_is_made_again_when_vllm_makes_its_cache_again(announced: list[str]) -> None:
    config = model("torch_native")
    group = CacheGroup(Served(config), ["layers.0"], block_size=BLOCK)
    assert group.stands
    layer = config.compilation_config.static_forward_context["layers.0"]
    layer.kv_cache = layer.kv_cache.clone()
    assert not group.stands


@pytest.mark.parametrize("backend", ["torch_native", "prefill=other,decode=torch_native"])
def test_prompts_beside_decodes_write_before_they_read(
    backend: str, announced: list[str], changed: Callable[..., Any]
) -> None:
    changed("other")
    group = CacheGroup(Served(model(backend)), ["layers.0"], block_size=BLOCK)
    steps = [step_of([1, 3], [5, 6]), step_of([3], [6]), step_of([1], [5])]
    assert [group.step(asked).writes_first for asked in steps] == [True, False, False]


@pytest.mark.parametrize(("guesses", "tokens"), [(0, 1), (3, 4)], ids=["decode", "verify"])
def test_a_replay_computes_what_an_eager_step_does(
    guesses: int, tokens: int, announced: list[str], graphed: str
) -> None:
    """Captured for four requests, replayed with three and padding, with one, then with four of other lengths."""
    config = model(graphed, graphs=True, guesses=guesses)
    whole = Served(config)
    eager, captured = (CacheGroup(whole, ["layers.0", "layers.1"], block_size=BLOCK) for _ in range(2))
    first = captured.captured_step(step_of([tokens] * 4, [tokens] * 4))
    assert first.batch.mode is (ForwardMode.TARGET_VERIFY if guesses else ForwardMode.DECODE)
    for lengths in ([9, 4, 17], [12], [5, 30, 8, 11]):
        asked = step_of([tokens] * len(lengths), lengths, padded=0)
        padded = step_of([tokens] * len(lengths), lengths, padded=4 - len(lengths))
        inputs = rows(4 * tokens)
        wanted = attend(eager, eager.step(asked), config, inputs, "layers.1")
        replay = captured.step(padded)
        assert replay.batch is first.batch
        assert replay.num_tokens == 4 * tokens
        found = attend(captured, replay, config, inputs, "layers.1")
        torch.testing.assert_close(found[: len(lengths) * tokens], wanted, rtol=1e-5, atol=1e-5)


def test_an_empty_step_of_a_captured_size_captures_nothing_again(announced: list[str], graphed: str) -> None:
    group = CacheGroup(Served(model(graphed, graphs=True)), ["layers.0"], block_size=BLOCK)
    first = group.captured_step(step_of([1] * 4, [1] * 4))
    assert group.captured_step(step_of([1] * 4, [1] * 4)).batch is first.batch
    assert group.step(step_of([1] * 2, [7, 8])).batch is not first.batch


def test_graphs_are_planned_where_there_are_any(announced: list[str], graphed: str) -> None:
    assert Served(model(graphed, graphs=True)).plan.config.cuda_graph
    assert not Served(model(graphed)).plan.config.cuda_graph
    without = Served(model("torch_native", graphs=True)).plan
    assert not without.config.cuda_graph
    assert "no CUDA graphs" in announced[-1]


def test_auto_prefers_what_has_graphs(announced: list[str], graphed: str) -> None:
    assert Served(model("auto")).plan.phases["decode"].backend.name == "torch_native"
    assert Served(model("auto", graphs=True)).plan.phases["decode"].backend.name == graphed


def test_layers_of_two_cache_dtypes(announced: list[str]) -> None:
    config = model("torch_native")
    config.compilation_config.static_forward_context["layers.1"].kv_cache_dtype = "fp8"
    with pytest.raises(ConfigError, match="caches of auto, fp8"):
        _ = Served(config).plan


def test_a_backend_that_cannot(announced: list[str]) -> None:
    with pytest.raises(PlanError, match="fa3"):
        _ = Served(model("fa3")).plan
    assert not announced


def test_reasons_against_a_layer() -> None:
    facts: dict[str, Any] = {
        "head_size": WIDTH, "kv_cache_dtype": "fp8", "block_size": None, "attn_type": "decoder", "use_mla": False,
        "has_sink": False, "has_sliding_window": False,
    }  # fmt: skip
    config = model("torch_native")
    config.parallel_config = None
    config.model_config.get_num_attention_heads = lambda _: HEADS
    config.model_config.get_num_kv_heads = lambda _: KV_HEADS
    assert planning.refusals(config, "torch_native", facts) == []
    assert planning.refusals(config, "torch_native", {**facts, "use_dcp": True}) == [
        "attn translates no decode context parallelism"
    ]
    refused = planning.refusals(config, "fa3", facts)
    assert refused[0] == "backend 'fa3' cannot run prefill"
    assert any("device_mismatch" in line for line in refused)
