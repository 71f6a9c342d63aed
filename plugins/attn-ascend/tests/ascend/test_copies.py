"""A cache of strides, as engines may have it, is read through copies of the step's pages, and never silently."""

from __future__ import annotations

import warnings

import pytest
import torch
from attn_ascend.backend import AscendBackend
from attn_ascend.copies import StridedCacheWarning, places
from attn_core.errors import ConfigError
from attn_core.planning.config import LayerKind
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.kv_cache import KVCache

from .steps import PAGE, Scene, assert_close, kind_of, mla_kind, scene

pytestmark = pytest.mark.usefixtures("emulated")

KINDS = {"128": kind_of(8, 2, 128), "64, a window": kind_of(8, 2, 64, sliding_window=7), "MLA": mla_kind(5)}
STEPS = {
    "decode": (ForwardMode.DECODE, (1, 1, 1), (130, 1, 260)),
    "extend": (ForwardMode.EXTEND, (5, 0, 33), (130, 4, 160)),
}


def strided(kind: LayerKind, step: str) -> Scene:
    """A scene whose keys and values lie beside each other in one tensor (MLA: rows with room between them)."""
    mode, query_lens, seq_lens = STEPS[step]
    found = scene(kind, query_lens, seq_lens, mode=mode)
    key, value = found.cache.k(0), found.cache.v(0)
    width = kind.qk_head_dim
    joined = torch.cat([key, key if value is None else value], -1)
    values = None if value is None else joined[..., width:]
    found.cache = KVCache({0: joined[..., :width]}, {0: values}, page_size=PAGE, layout=found.cache.layout)
    return found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", KINDS)
def test_a_cache_of_strides_gives_the_same_answer(name: str, step: str) -> None:
    found = strided(KINDS[name], step)
    with pytest.warns(StridedCacheWarning, match="cannot be read in place"):
        backend = AscendBackend(found.config, found.cache)
    backend.init_forward_metadata(found.batch)
    out = backend.forward(found.q, found.k, found.v, found.layer, found.batch)
    assert isinstance(out, torch.Tensor)
    assert_close(out, found.expected())


def test_layers_of_a_step_share_where_its_copies_lie() -> None:
    found = strided(KINDS["128"], "extend")
    with pytest.warns(StridedCacheWarning):
        backend = AscendBackend(found.config, found.cache)
    backend.init_forward_metadata(found.batch)
    backend.forward(found.q, found.k, found.v, found.layer, found.batch)
    copies = found.batch.plan_state.copies
    backend.forward(found.q, found.k, found.v, found.layer, found.batch)
    assert found.batch.plan_state.copies is copies
    assert copies.pages.numel() == 2 + 1 + 2


def test_a_contiguous_cache_is_read_in_place_and_says_nothing() -> None:
    found = scene(KINDS["128"], (3,), (130,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = AscendBackend(found.config, found.cache)
        backend.init_forward_metadata(found.batch)
        backend.forward(found.q, found.k, found.v, found.layer, found.batch)
    assert found.batch.plan_state.copies is None


def test_graphs_over_a_cache_of_strides_are_refused() -> None:
    found = strided(KINDS["128"], "decode")
    with pytest.warns(StridedCacheWarning):
        backend = AscendBackend(found.config, found.cache)
    with pytest.raises(ConfigError, match="cache of strides"):
        backend.init_cuda_graph_state(4, 4)


@pytest.mark.parametrize(("counts", "rows"), [([2, 0, 1], [[0, 1], [0, 0], [2, 0]]), ([0], [[0]]), ([], [])])
def test_places_of_copies_follow_each_other(counts: list[int], rows: list[list[int]]) -> None:
    assert places(counts) == rows
