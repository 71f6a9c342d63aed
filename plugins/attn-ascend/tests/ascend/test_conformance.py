"""The conformance kit on the emulated card: a spread of its cases passes, and catches faults planted in the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from attn_ascend import attend, backend, copies, latent, sinks, step, writing
from attn_ascend.attend import Output
from attn_ascend.emulator import fused
from attn_ascend.emulator.device import EMULATOR
from attn_ascend.sight import ALL_KEYS, CAUSAL, Sight
from attn_core.planning.discovery import discover
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing import verify
from attn_core.testing.refusals import refusal_cases, run_widened
from attn_core.testing.report import Report
from attn_core.testing.run import Target

DEVICE = "emulated:ascend"
Patch = pytest.MonkeyPatch


def kit(select: str, count: int) -> Report:
    """``count`` cases of the contract tier, as different as can be; all of it is `attn verify ascend --device ...`."""
    return verify("ascend", "contract", DEVICE, select=select, max_cases=count, probe=False)


@cache
def passes(select: str, count: int) -> bool:
    """Whether these cases pass without a fault: run once for all faults that they are to catch."""
    return kit(select, count).failures == ()


def test_a_spread_of_the_kits_cases_passes_at_the_level_it_may_claim() -> None:
    report = kit("", count=60)
    assert [result.case.id for result in report.failures] == []
    assert (report.level, report.device) == ("contract-emulated", DEVICE)


def _window_of_one_more(patch: Patch) -> None:
    right = attend.sight_of
    patch.setattr(attend, "sight_of", lambda c, window, n: right(c, None if window is None else window + 1, n))


def _window_forgotten_for_single_rows(patch: Patch) -> None:
    patch.setattr(attend, "_sight_of_run", lambda layer, lengths, wanted, run: ALL_KEYS if run.queries == 1 else CAUSAL)


def _scale_forgotten(patch: Patch) -> None:
    right = attend._heads
    patch.setattr(attend, "_heads", lambda layer: {**right(layer), "softmax_scale": 1.0})


def _sink_forgotten(patch: Patch) -> None:
    patch.setattr(backend, "add_sink", lambda out, lse, sink: (out, lse))


def _sink_scaled(patch: Patch) -> None:
    patch.setattr(backend, "add_sink", lambda out, lse, sink: sinks.add_sink(out, lse, 0.5 * sink))


def _lse_of_base_2(patch: Patch) -> None:
    right = backend.attend

    def wrong(*args: Any) -> Output:
        out, lse = right(*args)
        return out, None if lse is None else lse * 1.4426950408889634

    patch.setattr(backend, "attend", wrong)


def _one_key_too_few(patch: Patch) -> None:
    right = step.host_lengths

    def wrong(batch: Any, **options: Any) -> step.Lengths:
        lengths = right(batch, **options)
        return step.Lengths(lengths.queries, [max(n, m - 1) for n, m in lengths.pairs])

    patch.setattr(step, "host_lengths", wrong)


def _page_table_of_the_first_request(patch: Patch) -> None:
    right = backend.step_of

    def wrong(batch: Any) -> step.Step:
        made = right(batch)
        made.table = made.table[:1].expand(made.table.shape).contiguous()
        return made

    patch.setattr(backend, "step_of", wrong)


def _copies_in_another_order(patch: Patch) -> None:
    right = copies.named_pages
    patch.setattr(copies, "named_pages", lambda *args: right(*args).flip(0))


def _pieces_that_see_ahead(patch: Patch) -> None:
    patch.setattr(latent, "_pieces", lambda n, m: [(min(16, n - i), m) for i in range(0, n, 16)])


def _drafts_that_see_each_other(patch: Patch) -> None:
    def wrong(made: step.Step, run: step.Run) -> latent.Expanded:
        keys = made.lengths.keys[run.first : run.last]
        table = made.table[run.first : run.last].repeat_interleave(run.queries, 0)
        return latent.Expanded(table, torch.tensor(keys, dtype=torch.int32).repeat_interleave(run.queries))

    patch.setattr(latent, "expanded", wrong)


def _skipped_slots_written(patch: Patch) -> None:
    def wrong(operators: Any, cache: Any, layer: Any, k: Any, v: Any, slots: Any) -> None:
        writing.write(operators, cache, layer, k, v, slots.clamp(min=cache.page_size))

    patch.setattr(backend, "write", wrong)


def _values_written_as_keys(patch: Patch) -> None:
    patch.setattr(backend, "write", lambda ops, cache, layer, k, v, slots: writing.write(
        ops, cache, layer, k, None if v is None else k, slots))  # fmt: skip


def _given_keys_aligned_at_the_start(patch: Patch) -> None:
    patch.setattr(attend, "sight_of", lambda causal, window, n: Sight(4, next_tokens=0) if causal else Sight(4))
    patch.setattr(fused, "sight", _left_up)


def _left_up(mode: int, pre_tokens: int, next_tokens: int, queries: int, keys: int) -> torch.Tensor:
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    return (i - j <= pre_tokens) & (j - i <= next_tokens)


def _lengths_of_the_capture(patch: Patch) -> None:
    right = backend.AscendBackend.init_forward_metadata_replay_cuda_graph

    def wrong(self: backend.AscendBackend, batch: Any) -> None:
        kept = list(self._graph_steps[backend._graph_key(batch)].lengths.keys)
        right(self, batch)
        batch.plan_state.lengths.keys[:] = kept

    patch.setattr(backend.AscendBackend, "init_forward_metadata_replay_cuda_graph", wrong)


def _table_of_the_capture(patch: Patch) -> None:
    right = backend._refresh
    seen: set[int] = set()

    def wrong(made: step.Step, batch: Any) -> None:
        if id(made) not in seen:
            right(made, batch)
        made.slots.copy_(batch.slot_mapping)
        seen.add(id(made))

    patch.setattr(backend, "_refresh", wrong)


#: fault -> the cases that it must be caught in, by a part of their ids, and how many of them
FAULTS: dict[Callable[[Patch], None], tuple[str, int]] = {
    _window_of_one_more: ("window=", 12),
    _window_forgotten_for_single_rows: ("window=", 12),
    _scale_forgotten: ("decode/", 4),
    _sink_forgotten: ("sinks", 4),
    _sink_scaled: ("sinks", 4),
    _lse_of_base_2: ("lse", 4),
    _one_key_too_few: ("decode/", 4),
    _page_table_of_the_first_request: ("batch=", 4),
    _copies_in_another_order: ("joined", 6),
    _pieces_that_see_ahead: ("extend/mla:1x1", 3),
    _drafts_that_see_each_other: ("verify/mla:1x1", 4),
    _skipped_slots_written: ("extend/", 8),
    _values_written_as_keys: ("decode/", 4),
    _given_keys_aligned_at_the_start: ("ragged", 6),
    _lengths_of_the_capture: ("graph", 3),
    _table_of_the_capture: ("graph", 3),
}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__.strip("_") for fault in FAULTS])
def test_a_planted_fault_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    assert passes(*FAULTS[fault])
    fault(monkeypatch)
    assert kit(*FAULTS[fault]).failures != ()


def test_a_manifest_that_claims_more_is_caught() -> None:
    """Only the two promises about bits hold here unclaimed: the emulator computes in torch, and a chip may not."""
    system, ref = EMULATOR.system(), discover().find("ascend")
    target = Target(ref, system, EMULATOR.device())
    cases = [c for c in refusal_cases(ref.manifest, "contract", system) if not c.options & {"twice", "alone"}]
    with EMULATOR:
        passed = [case.id for case in cases if run_widened(case, target).status == "passed"]
    assert passed == []
    assert {case.refused for case in cases} >= {
        "dtype_unsupported", "kv_dtype_unsupported", "feature_unsupported", "group_size_unsupported",
        "head_dim_unsupported", "kv_layout_unsupported", "page_size_unsupported",
    }  # fmt: skip


def test_another_backend_that_steps_in_is_seen(monkeypatch: Patch) -> None:
    """A silent fallback gives right answers, so that only the witness can tell."""
    batches: list[ForwardBatch] = []
    right = backend.step_of
    monkeypatch.setattr(backend, "step_of", lambda batch: (batches.append(batch), right(batch))[1])

    def falls_back(
        self: backend.AscendBackend, fused: Any, q: Any, keys: Any, layer: Any, *_: Any, **options: Any
    ) -> Any:
        native, batch = TorchNativeBackend(self.config, self.kv_cache), replace(batches[-1], plan_state=None)
        native.init_forward_metadata(batch)
        wanted = {name: options[name] for name in ("return_lse", "out")}
        return native.forward_decode(q, None, None, layer, batch, save_kv_cache=False, **wanted)

    monkeypatch.setattr(backend.AscendBackend, "_attend", falls_back)
    checks = {fault.check for result in kit("decode/8x2x64/1@", count=2).failures for fault in result.faults}
    assert checks == {"witness"}
