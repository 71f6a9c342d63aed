"""What a step is made of is made once, for all layers alike, and on the device: its page table above all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_wave import attending, tables
from attn_wave.backend import WaveBackend
from attn_wave.emulator.device import Gfx942

from .small import PAGE

LAYERS = 6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often page tables are expanded, turned into rows of a pool, and work lists made."""
    counted: Counter[str] = Counter()

    def counting(name: str, right: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counted[name] += 1
            return right(*args, **options)

        return call

    monkeypatch.setattr(tables.KeyPlaces, "of", counting("expanded", tables.KeyPlaces.of))
    monkeypatch.setattr(tables.KeyPlaces, "rows", counting("rows", tables.KeyPlaces.rows))
    monkeypatch.setattr(attending, "work_of", counting("work lists", attending.work_of))
    return counted


def test_the_page_table_is_expanded_once_a_step(emulated: Gfx942, calls: Counter[str]) -> None:
    """Every other layer has a window: that makes two work lists, of one expanded table."""
    kinds = tuple(
        LayerKind(4, 2, 64, 64, layer_ids=tuple(range(i, LAYERS, 2)), sliding_window=window)
        for i, window in enumerate((None, 8))
    )
    config = AttentionConfig(layers=kinds, dtype="float16", page_size=PAGE, kv_layout="NHD", max_context_len=512)
    backend = WaveBackend(config, KVCache.allocate(config, num_pages=16))
    q, k = torch.randn(2, 4, 64).half(), torch.randn(2, 2, 64).half()
    for step in (1, 2):
        batch = ForwardBatch.build(
            ForwardMode.DECODE, query_lens=[1, 1], seq_lens=[40, 9], pages=[[1, 2, 3], [4]], page_size=PAGE
        )
        backend.init_forward_metadata(batch)
        assert calls["expanded"] == step
        for i in range(LAYERS):
            backend.forward(q, k, k, AttentionLayer.of_kind(kinds[i % 2], i), batch)
        # keys and values of one layout have one table between them
        assert calls == {"expanded": step, "rows": step, "work lists": 2 * step}


def test_it_is_expanded_where_it_lies() -> None:
    """On the device of the page table, and without asking it anything: a tensor that has no numbers gets through."""
    table, lengths = torch.zeros(2, 3, dtype=torch.int32, device="meta"), torch.zeros(2, device="meta").long()
    places = tables.KeyPlaces.of(table, lengths, torch.tensor([40, 9]), PAGE)
    rows = places.rows(torch.zeros(16, PAGE, 2, 64, device="meta"))
    assert (rows.device.type, rows.dtype, rows.shape) == ("meta", torch.int32, (49,))
