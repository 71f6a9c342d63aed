"""The schemas that were written down: every operator that is called has one, and refuses what does not bind."""

from __future__ import annotations

import pytest
import torch
from attn_ascend.emulator.library import _KERNELS, vendored

from . import calls

pytestmark = pytest.mark.usefixtures("emulated")


def test_every_kernel_stands_behind_a_schema_and_every_schema_has_one() -> None:
    names = [schema.partition("(")[0] for schema in vendored()["schemas"]]
    assert sorted(names) == sorted(_KERNELS)


def test_the_registered_operators_have_the_schemas_that_were_written_down() -> None:
    registered = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith(("npu::", "atb::"))}
    assert set(vendored()["schemas"]) <= registered


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a parameter that is not there", {"softcap": 30.0}),
        ("a name of version 1", {"softmax_lse_flag": True}),
        ("a float where an int belongs", {"sparse_mode": 3.5}),
        ("a number where a tensor belongs", {"block_table": 3}),
    ],
)
def test_a_call_that_does_not_bind_is_refused_by_the_schema(what: str, named: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match="npu_fused_infer_attention_score_v2"):
        calls.tokens().with_(**named).run()
