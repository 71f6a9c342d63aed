"""A backend of small pages over a cache of large ones gives what it would over its own pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import BatchError, ConfigError
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.runtime.conversion import PageTableConversion
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.torch_native.backend import TorchNativeBackend

from .scenes import GQA3, MLA, Scene, assert_right, scene

STEPS: dict[str, tuple[ForwardMode, list[int], list[int]]] = {
    "prefix": (ForwardMode.EXTEND, [5, 16, 1], [21, 48, 33]),
    "decode": (ForwardMode.DECODE, [1, 1, 1, 1], [1, 16, 17, 40]),
    "mixed": (ForwardMode.MIXED, [1, 1, 6], [20, 1, 6]),
    "verify": (ForwardMode.TARGET_VERIFY, [4, 4], [4, 20]),
}


def converted(made: Scene, page_size: int) -> PageTableConversion:
    inner = TorchNativeBackend(made.config.replace(page_size=page_size), made.cache.with_page_size(page_size))
    return PageTableConversion(inner, made.cache)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [GQA3, replace(GQA3, sliding_window=7), MLA], ids=["mha", "window", "mla"])
def test_smaller_pages_change_nothing(kind: Any, step: str, page_size: int) -> None:
    mode, query_lens, seq_lens = STEPS[step]
    made = scene(kind, mode, query_lens=query_lens, seq_lens=seq_lens)
    assert_right(made.run(converted(made, page_size), return_lse=True), made.expected())


def test_the_encoders_pages_are_converted_too() -> None:
    crossing = replace(GQA3, cross=True)
    made = scene(crossing, ForwardMode.EXTEND, query_lens=[2, 3], seq_lens=[2, 3], encoder_lens=[33, 5])
    assert_right(made.run(converted(made, 4)), made.expected())


def test_the_rewritten_table_names_every_part_of_a_page() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    made.batch.page_table = torch.tensor([[3, 1]], dtype=torch.int32)
    batch = replace(made.batch)
    converted(made, 4).init_forward_metadata(batch)
    step: ForwardBatch = batch.plan_state
    assert step.page_table.tolist() == [[12, 13, 14, 15, 4, 5, 6, 7]]
    assert step.page_table.dtype is torch.int32
    assert step.slot_mapping is made.batch.slot_mapping, "slots mean the same"


def test_writes_before_attending_reach_the_same_memory() -> None:
    made = scene(GQA3, ForwardMode.EXTEND, query_lens=[5], seq_lens=[21])
    backend = converted(made, 4)
    backend.write_kv(made.k, made.v, made.layer, made.batch.slot_mapping)
    made.k = made.v = None
    assert_right(made.run(backend, save_kv_cache=False), made.expected())


def test_more_page_ids_than_int32_holds_are_refused() -> None:
    held = torch.zeros(1, 65536, 1, 1).expand(40000, -1, -1, -1)  # a large cache that takes no memory
    cache = KVCache({0: held}, {0: held}, page_size=65536, layout="NHD")
    made = scene(GQA3, query_lens=[1], seq_lens=[1])
    inner = TorchNativeBackend(made.config.replace(page_size=1), made.cache.with_page_size(1))
    with pytest.raises(ConfigError, match="fewer than 2\\*\\*31"):
        PageTableConversion(inner, cache)


@pytest.mark.parametrize("tree", [None, TreeMask.from_parents(torch.tensor([[-1, 0, 0, 1]] * 2))])
def test_a_replay_rewrites_into_the_same_buffers(tree: TreeMask | None) -> None:
    made = scene(GQA3, ForwardMode.TARGET_VERIFY, query_lens=[4, 4], seq_lens=[9, 40], tree=tree)
    backend = converted(made, 4)
    backend.init_cuda_graph_state(2, 8)
    batch = replace(made.batch)
    backend.init_forward_metadata_capture_cuda_graph(batch)
    table = batch.plan_state.page_table
    made.batch.page_table = made.batch.page_table.clone()
    again = replace(made.batch)
    backend.init_forward_metadata_replay_cuda_graph(again)
    assert again.plan_state.page_table.data_ptr() == table.data_ptr()
    assert_right(backend.forward(made.q, made.k, made.v, made.layer, again), made.expected())


def test_a_replay_with_a_wider_table_than_the_buffers_is_refused() -> None:
    made = scene(GQA3, ForwardMode.DECODE, query_lens=[1], seq_lens=[20])
    backend = converted(made, 4)
    backend.init_cuda_graph_state(1, 1)
    backend.init_forward_metadata_capture_cuda_graph(replace(made.batch))
    wider = torch.zeros(1, 9, dtype=torch.int32)
    with pytest.raises(BatchError, match="9 columns"):
        backend.init_forward_metadata_replay_cuda_graph(replace(made.batch, page_table=wider))
