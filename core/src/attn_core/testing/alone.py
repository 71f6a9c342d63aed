"""Batch invariance: each request of a step runs alone, and must give the bits it gave in company."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from attn_core.testing.checks import Fault, Output, differing
from attn_core.testing.scene import Inputs, Step

if TYPE_CHECKING:
    from attn_core.testing.run import Trial


def alone_faults(trial: Trial) -> list[Fault]:
    """The first request of the first wave that gives other bits alone; nothing if none does."""
    trial.play()  # afterwards the cache holds every key, and writing one again changes nothing
    first = 0
    for step in trial.scene.waves[0]:
        together = trial.clean[first : first + len(step.inputs)]
        first += len(step.inputs)
        for b, (begin, end) in enumerate(pairwise(step.batch.query_start_loc.tolist())):
            where = _differs_alone(trial, step, b, slice(begin, end), together)
            if where is not None:
                return [Fault("batch_invariant", f"request {b}: {where}")]
    return []


def _differs_alone(trial: Trial, step: Step, b: int, rows: slice, together: list[Output]) -> str | None:
    batch = _only(step.batch, b, rows)
    trial.witness.backend.init_forward_metadata(batch)
    alone = [trial.forward(_rows_of(inputs, rows), batch) for inputs in step.inputs]
    in_company = [Output(o.out[rows], None if o.lse is None else o.lse[rows]) for o in together]
    return differing(alone, in_company)


def _only(batch: ForwardBatch, b: int, rows: slice) -> ForwardBatch:
    """A batch of request ``b`` alone. The encoder's keys are in the cache: it has no slots for them."""
    one = slice(b, b + 1)
    count = rows.stop - rows.start
    cut = {
        name: getattr(batch, name)[one]
        for name in ("seq_lens_cpu", "spans", "encoder_seq_lens", "encoder_page_table", "encoder_seq_lens_cpu")
        if getattr(batch, name) is not None
    }
    starts = batch.query_start_loc.new_tensor([0, count])
    return replace(
        batch,
        seq_lens=batch.seq_lens[one],
        query_start_loc=starts,
        query_start_loc_cpu=None if batch.query_start_loc_cpu is None else starts.cpu(),
        page_table=batch.page_table[one],
        slot_mapping=batch.slot_mapping[rows],
        num_decodes=int(batch.mode is ForwardMode.MIXED and b < batch.num_decodes),
        tree=None if batch.tree is None else TreeMask(batch.tree.visible[one]),
        encoder_slot_mapping=None,
        plan_state=None,
        **cut,
    )


def _rows_of(inputs: Inputs, rows: slice) -> Inputs:
    if inputs.layer.cross:
        return Inputs(inputs.layer, inputs.q[rows], None, None)
    k, v = (None if t is None else t[rows] for t in (inputs.k, inputs.v))
    return Inputs(inputs.layer, inputs.q[rows], k, v)
