"""The protocol itself: which forward a mode gets, what a backend without a feature says, and layers of a kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import ConfigError
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from .scenes import GQA3, MLA, scene


class Minimal(AttentionBackend):
    """Two forwards and one metadata function make a backend."""

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = "planned"

    def forward_extend(self, q: Tensor, k: Any, v: Any, layer: Any, batch: Any, **options: Any) -> Any:
        return "extend", options

    def forward_decode(self, q: Tensor, k: Any, v: Any, layer: Any, batch: Any, **options: Any) -> Any:
        return "decode", options


@pytest.mark.parametrize("mode", [mode for mode in ForwardMode if mode is not ForwardMode.IDLE])
def test_only_decode_steps_decode(mode: ForwardMode) -> None:
    made = scene(GQA3, mode, query_lens=[1], seq_lens=[3])
    backend = Minimal(made.config, made.cache)
    which, options = made.run(backend, return_lse=True)
    assert which == ("decode" if mode is ForwardMode.DECODE else "extend")
    assert options == {"return_lse": True}


def test_the_forward_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="abstract"):
        AttentionBackend(scene(GQA3, query_lens=[1], seq_lens=[1]).config, None)  # type: ignore[abstract,arg-type]


def test_a_backend_without_a_feature_says_where_it_is_refused() -> None:
    made = scene(GQA3, query_lens=[1], seq_lens=[3])
    backend = Minimal(made.config, made.cache)
    starts = torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="Minimal has no forward_ragged"):
        backend.forward_ragged(
            made.q, made.k, made.v, made.layer,
            query_start_loc=starts, key_start_loc=starts, max_query_len=1, max_key_len=1, causal=True,
        )  # fmt: skip
    for call in (
        lambda: backend.init_cuda_graph_state(1, 1),
        lambda: backend.init_forward_metadata_capture_cuda_graph(made.batch),
        lambda: backend.init_forward_metadata_replay_cuda_graph(made.batch),
    ):
        with pytest.raises(ConfigError, match="Minimal has no CUDA graphs"):
            call()
    assert backend.build_reasons(made.config, "decode") == ()
    backend.warmup(made.config)


def test_write_kv_writes_the_cache() -> None:
    made = scene(GQA3, query_lens=[2], seq_lens=[3])
    Minimal(made.config, made.cache).write_kv(made.k, made.v, made.layer, made.batch.slot_mapping)
    page, offset = made.batch.slot_mapping // 16, made.batch.slot_mapping % 16
    assert torch.equal(made.cache.k_nhd(0)[page, offset], made.k)


def test_a_layer_of_a_kind_has_its_maths() -> None:
    kind = replace(GQA3, sliding_window=9, softcap=2.0, sinks=True, cross=False)
    layer = AttentionLayer.of_kind(kind, 4, sinks=torch.zeros(6), k_scale=0.5)
    assert (layer.layer_id, layer.sliding_window, layer.softcap, layer.k_scale) == (4, 9, 2.0, 0.5)
    assert layer.scale == 32**-0.5
    assert layer.group_size == 3
    assert AttentionLayer.of_kind(MLA, 0).scale == 0.2


@pytest.mark.parametrize("has", [True, False])
def test_sinks_come_exactly_when_the_kind_has_them(has: bool) -> None:
    with pytest.raises(ConfigError, match=f"its kind has sinks={has}"):
        AttentionLayer.of_kind(replace(GQA3, sinks=has), 0, sinks=None if has else torch.zeros(6))
