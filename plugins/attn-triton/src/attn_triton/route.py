"""Which kernel a step goes to."""

from __future__ import annotations

from attn_triton.kinds import Kind
from attn_triton.step import Step

#: Query rows of a request and KV head up to which its keys are split over programs, whatever the mode is.
FEW_ROWS = 64


def by_split(step: Step, kind: Kind, *, invariant: bool) -> bool:
    """Whether the split kernel runs it: few rows, and nothing that only the extend kernel knows (spans; one way for all
    batches).
    """
    if invariant or (step.spans is not None and not step.single and not kind.cross):
        return False
    return step.single or step.verify or step.max_query_len * kind.geometry.group <= FEW_ROWS
