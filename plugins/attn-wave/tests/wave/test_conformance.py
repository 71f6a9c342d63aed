"""The conformance kit on the emulated chip: a spread of its cases passes, and catches faults planted in the backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_wave import attending, backend, graphs, joining, step, tables, work
from attn_wave.emulator.device import Gfx942

from .kit import DEVICE, failures, kit
from .small import forwards

Patch = pytest.MonkeyPatch


@cache
def passes(select: str, count: int) -> bool:
    """Whether these cases pass without a fault: run once for all faults that they are to catch."""
    return failures(select, count) == []


def test_a_spread_of_the_kits_cases_passes_at_the_level_it_may_claim() -> None:
    report = kit("", 72)
    assert [result.case.id for result in report.failures] == []
    assert (report.level, report.device) == ("isa-emulated", DEVICE)


def test_the_order_of_waves_and_workgroups_changes_no_bit(emulated: Gfx942) -> None:
    """Four waves a workgroup and several workgroups a request: what one leaves for another would show."""
    first = list(forwards(seed=1))
    emulated.runtime.backwards = True
    for one, other in zip(first, forwards(seed=1), strict=True):
        assert torch.equal(one.out, other.out)
        assert torch.equal(one.lse, other.lse)


def _window_of_one_more(patch: Patch) -> None:
    right = tables.causal_sight
    patch.setattr(step, "causal_sight", lambda p, window, spans=None: right(p, window and window + 1, spans))


def _causality_one_ahead(patch: Patch) -> None:
    right = tables.causal_sight

    def wrong(positions: Any, window: Any, spans: Any = None) -> tables.Sight:
        sight = right(positions, window, spans)
        return tables.Sight(sight.low, sight.high + 1)

    patch.setattr(step, "causal_sight", wrong)


def _scale_forgotten(patch: Patch) -> None:
    patch.setattr(attending.Kernels, "factors", lambda self, layer: torch.tensor([1.0, layer.softcap]))


def _softcap_halved(patch: Patch) -> None:
    patch.setattr(attending.Kernels, "factors", lambda self, layer: torch.tensor([layer.scale, layer.softcap / 2]))


def _sink_forgotten(patch: Patch) -> None:
    right = joining._sinks
    patch.setattr(joining, "_sinks", lambda runs, sinks, *rest: right(runs, None, *rest))


def _lse_left_in_base_2(patch: Patch) -> None:
    right = joining.join

    def wrong(*args: Any) -> Any:
        out, lse = right(*args)
        return out, lse / math.log(2)

    patch.setattr(attending, "join", wrong)


def _rows_of_the_output_by_kv_head(patch: Patch) -> None:
    patch.setattr(joining, "_places", lambda runs, device: torch.arange(runs.rows, dtype=torch.int32))


def _last_run_not_joined(patch: Patch) -> None:
    right = joining.Runs
    patch.setattr(attending, "Runs", lambda results, lse, count, *rest: right(results, lse, max(1, count - 1), *rest))


def _last_run_left_out(patch: Patch) -> None:
    right = work.work_of

    def wrong(*args: Any, **options: Any) -> work.Work:
        made = right(*args, **options)
        return work.Work(made.items[:-1], made.runs)

    patch.setattr(attending, "work_of", wrong)


def _page_table_of_the_first_request(patch: Patch) -> None:
    right = tables.KeyPlaces.of
    patch.setattr(tables.KeyPlaces, "of", lambda table, *rest: right(table[:1].expand(table.shape), *rest))


def _values_of_the_key_before(patch: Patch) -> None:
    right = backend.WaveBackend._paged_keys

    def wrong(self: Any, *args: Any) -> attending.Keys:
        keys = right(self, *args)
        return replace(keys, value_rows=keys.value_rows.roll(1))

    patch.setattr(backend.WaveBackend, "_paged_keys", wrong)


def _values_of_the_first_head(patch: Patch) -> None:
    right = work.Heads
    patch.setattr(attending, "Heads", lambda kv, group, q, k, v: right(kv, group, q, k, 0))


def _spans_forgotten(patch: Patch) -> None:
    right = tables.causal_sight
    patch.setattr(step, "causal_sight", lambda positions, window, spans=None: right(positions, window))


def _tree_without_its_mask(patch: Patch) -> None:
    right = step._tree_parts

    def wrong(*args: Any) -> list[step.Part]:
        prefix, drafts = right(*args)
        return [prefix, replace(drafts, visible=torch.ones_like(drafts.visible))]

    patch.setattr(step, "_tree_parts", wrong)


def _skipped_slots_written(patch: Patch) -> None:
    right = backend.WaveBackend._save

    def wrong(self: Any, k: Any, v: Any, layer: Any, batch: Any) -> None:
        right(self, k, v, layer, replace(batch, slot_mapping=batch.slot_mapping.clamp(min=self.kv_cache.page_size)))

    patch.setattr(backend.WaveBackend, "_save", wrong)


def _given_keys_aligned_at_the_start(patch: Patch) -> None:
    right = backend.given_part

    def wrong(starts: Any, key_starts: Any, *rest: Any) -> step.Part:
        part = right(starts, key_starts, *rest)
        shift = (part.reach.end - part.reach.queries)[torch.repeat_interleave(torch.diff(starts).long())]
        return replace(part, sight=tables.Sight(part.sight.low, (part.sight.high - shift).clamp(min=1)))

    patch.setattr(backend, "given_part", wrong)


class _Kept(dict[object, object]):
    def clear(self) -> None:
        """A replay that keeps what the capture made."""


def _work_of_the_capture(patch: Patch) -> None:
    right = graphs.Step
    patch.setattr(graphs, "Step", lambda *args: right(*args, made=_Kept()))


def _pages_of_the_capture(patch: Patch) -> None:
    right = graphs._copy_columns
    seen: set[int] = set()

    def wrong(buffer: Any, table: Any) -> None:
        if buffer.data_ptr() not in seen:
            right(buffer, table)
        seen.add(buffer.data_ptr())

    patch.setattr(graphs, "_copy_columns", wrong)


#: fault -> the cases that it must be caught in, by a part of their ids, and how many of them
FAULTS: dict[Callable[[Patch], None], tuple[str, int]] = {
    _window_of_one_more: ("window=", 6),
    _causality_one_ahead: ("extend/", 4),
    _scale_forgotten: ("decode/", 4),
    _softcap_halved: ("softcap", 4),
    _sink_forgotten: ("sinks", 4),
    _lse_left_in_base_2: ("lse", 4),
    _last_run_left_out: ("decode/", 4),
    _last_run_not_joined: ("tree", 4),
    _rows_of_the_output_by_kv_head: ("batch=", 4),
    _page_table_of_the_first_request: ("batch=", 4),
    _values_of_the_key_before: ("decode/", 4),
    _values_of_the_first_head: ("decode/", 4),
    _spans_forgotten: ("spans", 4),
    _tree_without_its_mask: ("tree", 4),
    _skipped_slots_written: ("extend/", 8),
    _given_keys_aligned_at_the_start: ("ragged", 6),
    _work_of_the_capture: ("graph", 3),
    _pages_of_the_capture: ("graph", 3),
}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__.strip("_") for fault in FAULTS])
def test_a_planted_fault_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    assert passes(*FAULTS[fault])
    fault(monkeypatch)
    assert failures(*FAULTS[fault]) != []


def test_another_backend_that_steps_in_is_seen(monkeypatch: Patch) -> None:
    """A silent fallback gives right answers, so that only the witness can tell."""

    def falls_back(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, **options: Any) -> Any:
        native = TorchNativeBackend(self.config, self.kv_cache)
        mine = replace(batch, plan_state=None)
        native.init_forward_metadata(mine)
        return native.forward_decode(q, k, v, layer, mine, **options)

    monkeypatch.setattr(backend.WaveBackend, "forward_decode", falls_back)
    checks = {fault.check for result in kit("decode/8x2x64/1@", 2).failures for fault in result.faults}
    assert checks == {"witness"}
