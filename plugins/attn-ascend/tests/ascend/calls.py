"""Valid calls of every operator, as arguments that a test may change in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from attn_ascend.sight import CAUSAL
from torch import Tensor

CPU = torch.device("cpu")
BLOCKS, SIZE = 6, 128


@dataclass(frozen=True)
class OperatorCall:
    """One call: ``operator`` as "namespace::name", its positional and named arguments."""

    operator: str
    positional: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        namespace, _, name = self.operator.partition("::")
        name, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")(
            *self.positional, **self.named
        )

    def with_(self, **changes: Any) -> OperatorCall:
        """The same with other arguments; ``query``, ``key``, ``value`` or ``_0`` change positional ones."""
        positional, named = list(self.positional), dict(self.named)
        for name, value in changes.items():
            place = {"query": 0, "key": 1, "value": 2}.get(name) if "fused" in self.operator else None
            if name.startswith("_"):
                place = int(name[1:])
            if place is None:
                named[name] = value
            else:
                positional[place] = value
        return replace(self, positional=tuple(positional), named=named)


def floats(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def table(rows: int = 2) -> Tensor:
    return torch.tensor([[2, 4, 1], [5, 3, 0]], dtype=torch.int32)[:rows].contiguous()


def tokens(width: int = 128, *, version: int = 2, dtype: torch.dtype = torch.float16) -> OperatorCall:
    """TND over pages, causal: 3 and 5 queries, 200 and 130 keys, 8 heads on 2."""
    cache = floats(BLOCKS, SIZE, 2 * width, dtype=dtype)
    named = {"actual_seq_qlen": [3, 8], "actual_seq_kvlen": [200, 130], "block_table": table(), "block_size": SIZE}
    named |= {"input_layout": "TND", "num_query_heads": 8, "num_key_value_heads": 2, "softmax_scale": 0.1}
    named |= CAUSAL.arguments(CPU)
    return _versioned(version, (floats(8, 8, width, dtype=dtype), cache, cache.clone()), named)


def rows(queries: int, width: int = 64, *, version: int = 2) -> OperatorCall:
    """BSND over pages: 2 requests of ``queries`` queries each."""
    cache = floats(BLOCKS, SIZE, 2 * width)
    named = {"actual_seq_kvlen": [200, 130], "block_table": table(), "block_size": SIZE, "input_layout": "BSND"}
    named |= {"num_query_heads": 8, "num_key_value_heads": 2, "softmax_scale": 0.1}
    if queries > 1:
        named |= CAUSAL.arguments(CPU)
    return _versioned(version, (floats(2, queries, 8, width), cache, cache.clone()), named)


def given(width: int = 192, v_width: int = 128) -> OperatorCall:
    """TND over given keys, as expanded MLA has them."""
    named = {"actual_seq_qlen": [3, 8], "actual_seq_kvlen": [7, 20], "input_layout": "TND", "num_query_heads": 8}
    named |= {"num_key_value_heads": 8, "softmax_scale": 0.1, **CAUSAL.arguments(CPU)}
    tensors = (floats(8, 8, width), floats(20, 8, width), floats(20, 8, v_width))
    return _versioned(2, tensors, named)


def latent(queries: int, *, heads: int = 4, version: int = 2) -> OperatorCall:
    """A latent of 512 with its rotary part: single queries as rows, several as tokens."""
    cache, rotary = floats(BLOCKS, SIZE, 512), floats(BLOCKS, SIZE, 64)
    named: dict[str, Any] = {
        "key_rope": rotary,
        "num_query_heads": heads,
        "num_key_value_heads": 1,
        "softmax_scale": 0.1,
    }
    named |= {"block_table": table(), "block_size": SIZE, "actual_seq_kvlen": [200, 130]}
    shape = (2, 1, heads) if queries == 1 else (2 * queries, heads)
    named |= {"query_rope": floats(*shape, 64), "input_layout": "BSND" if queries == 1 else "TND"}
    if queries > 1:
        named |= {"actual_seq_qlen": [queries, 2 * queries], **CAUSAL.arguments(CPU)}
    return _versioned(version, (floats(*shape, 512), cache, cache), named)


def out_form(call: OperatorCall) -> OperatorCall:
    """The same call in the form that fills a given tensor."""
    query, value = call.positional[0], call.positional[2]
    width = value.shape[-1] // call.named["num_key_value_heads"]
    out = [query.new_empty(*query.shape[:-1], width), torch.empty(1)]
    return replace(call, operator=f"{call.operator}.out", named={**call.named, "workspace": torch.empty(1), "out": out})


def paged(width: int = 64) -> OperatorCall:
    """ATB's paged attention: 2 queries, 8 heads on 2."""
    cache, out = floats(BLOCKS, SIZE, 2, width), floats(2, 8, width)
    lengths = torch.tensor([200, 130], dtype=torch.int32)
    arguments = (floats(2, 8, width), cache, cache.clone(), 2, 8, 0.1, table(), lengths, out)
    return OperatorCall("atb::_npu_paged_attention", arguments)


def paged_latent() -> OperatorCall:
    """ATB's paged attention over latent rows: 2 queries of 5 heads."""
    lengths = torch.tensor([200, 130], dtype=torch.int32)
    arguments = (floats(2, 5, 576), floats(BLOCKS, SIZE, 1, 576), 1, 5, 0.1, table(), lengths, 512, floats(2, 5, 512))
    return OperatorCall("atb::_npu_paged_attention_mla", arguments)


def write(count: int = 3) -> OperatorCall:
    """ATB's cache write."""
    caches = floats(BLOCKS, SIZE, 2, 64), floats(BLOCKS, SIZE, 2, 64)
    slots = torch.tensor([130, -1, 257][:count], dtype=torch.int32)
    return OperatorCall("atb::_npu_reshape_and_cache", (floats(count, 2, 64), floats(count, 2, 64), *caches, slots))


def scatter() -> OperatorCall:
    """aclnn's cache write."""
    call = write()
    return OperatorCall("npu::npu_scatter_pa_kv_cache", call.positional, {"cache_mode": "Norm"}).with_(
        _4=torch.tensor([130, 131, 257], dtype=torch.int32)
    )


_V1 = {
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "return_softmax_lse": "softmax_lse_flag",
}


def _versioned(version: int, tensors: tuple[Tensor, ...], named: dict[str, Any]) -> OperatorCall:
    if version == 2:
        return OperatorCall("npu::npu_fused_infer_attention_score_v2", tensors, named)
    renamed = {_V1.get(name, name): value for name, value in named.items()}
    return OperatorCall("npu::npu_fused_infer_attention_score", tensors, renamed)
