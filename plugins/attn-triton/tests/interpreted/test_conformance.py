"""The conformance kit on Triton's interpreter: its whole contract tier, and a spread over what numerics adds."""

from __future__ import annotations

from typing import Final

import pytest
from attn_core.testing.agenda import REFUSALS
from attn_core.testing.cases import Case
from attn_core.testing.generation import spread
from attn_core.testing.plugin import Subject

#: Cases of what numerics adds: the interpreter takes longer for one than for those of the contract, about half a second
#: each. All of them: attn verify triton --device emulated:triton-interpreter --tier numerics.
NUMERICS: Final = 24

#: Cases that were wrong once, and why.
ONCE_WRONG: Final = (
    # probabilities in float16 beside a sink that outweighs all keys
    "extend/32x2x64+window=1+sinks/64@64/dtype=float16/page_size=64/memory=descending/seed=1/lse/out/hot/joined/holes/twice",
)
_subject = Subject("triton", "numerics", "emulated:triton-interpreter", seed=0)
_parts = _subject.agenda.parts
CASES: Final[list[Case]] = [
    *map(Case.parse, ONCE_WRONG),
    *(case for case, part in _parts.items() if part in (REFUSALS, "contract")),
    *spread([case for case, part in _parts.items() if part == "numerics"], NUMERICS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_conformance(case: Case) -> None:
    result = _subject.run(case)
    assert result.status == "passed", "\n".join(map(str, result.faults)) or result.note
