"""The requests of a call: how many queries and keys each has, checked against the tensors, and its keys read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attn_ascend.emulator.call import Call
from attn_ascend.emulator.maths import read_pages
from attn_ascend.emulator.rules import need


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv] of one request; the rotary parts are joined to q and k."""

    q: Tensor
    k: Tensor
    v: Tensor


def requests_of(call: Call) -> Iterator[Request]:
    """Every request of a call whose form has been checked."""
    queries, keys = query_counts(call), key_counts(call)
    start = key_start = 0
    for i, (n, m) in enumerate(zip(queries, keys, strict=True)):
        own, own_keys = slice(start, start + n), slice(key_start, key_start + m)
        start, key_start = start + n, key_start + m
        q = call.query[own] if call.tokens else call.query[i]
        k, v = _keys(call, call.key, i, own_keys), _keys(call, call.value, i, own_keys)
        if call.query_rope is not None and call.key_rope is not None:
            rope = call.query_rope[own] if call.tokens else call.query_rope[i]
            q = torch.cat([q, rope], -1)
            k = torch.cat([k, _keys(call, call.key_rope, i, own_keys)], -1)
        yield Request(q, k, v)


def check_requests(call: Call) -> None:
    """Lengths, block table and cache form."""
    if call.tokens:
        need(call.query_lengths is not None and call.key_lengths is not None, "lengths_needed", "TND without lengths")
        _check_cumulative("query lengths", call.query_lengths or [], call.query.shape[0])
        need(call.query.shape[0] <= 1 << 20, "tokens", f"{call.query.shape[0]} tokens")
        if not call.paged:
            _check_cumulative("key lengths", call.key_lengths or [], call.key.shape[0])
    need(not call.paged or call.key_lengths is not None, "lengths_needed", "pages without key lengths")
    queries = query_counts(call)
    if call.key_lengths is not None:
        need(
            len(call.key_lengths) == len(queries),
            "lengths_count",
            f"{len(call.key_lengths)} key lengths, {len(queries)} requests",
        )
    need(not call.tokens or len(queries) <= 4096, "lengths_count", f"{len(queries)} requests")
    keys = key_counts(call)
    need(min([*queries, *keys], default=0) >= 0, "lengths_range", f"lengths {queries}, {keys}")
    if call.table is not None:
        _check_pages(call, call.table, len(queries), keys)
    else:
        need(
            call.tokens or max(keys, default=0) <= call.key.shape[1],
            "lengths_range",
            f"{keys} of {tuple(call.key.shape)}",
        )
    need(not call.single or max(keys, default=0) <= 262144, "long_single", f"{max(keys, default=0)} keys")


def query_counts(call: Call) -> list[int]:
    if call.tokens:
        return _differences(call.query_lengths or [])
    return [call.query.shape[1]] * call.query.shape[0]


def key_counts(call: Call) -> list[int]:
    if call.key_lengths is None:
        return [call.key.shape[1]] * call.key.shape[0]
    return _differences(call.key_lengths) if call.tokens and not call.paged else call.key_lengths


def _differences(ends: list[int]) -> list[int]:
    return [end - start for start, end in pairwise([0, *ends])]


def _check_cumulative(name: str, ends: list[int], total: int) -> None:
    need(
        all(n >= 0 for n in _differences(ends)) and ends[-1:] == [total],
        "lengths_cumulative",
        f"{name} {ends} of {total} tokens",
    )


def _check_pages(call: Call, table: Tensor, requests: int, keys: list[int]) -> None:
    form = table.dtype == torch.int32 and table.dim() == 2 and table.shape[0] == requests
    need(form, "table", f"block_table {table.dtype} {tuple(table.shape)} for {requests} requests")
    size = call.block_size
    need(call.key.dim() == 3, "cache_form", f"a cache of {call.key.dim()} axes")
    fits = size == call.key.shape[1] and size > 0 and size % 16 == 0
    if call.tokens:
        fits = fits and size <= 1024
    elif call.single:
        fits = fits and size <= 512
    else:
        fits = fits and size % 128 == 0 and 128 <= size <= 512
    need(fits, "block_size", f"block_size {size} of a cache {tuple(call.key.shape)} in {call.layout}")
    need(call.key.shape[-1] <= 65535, "cache_row", f"rows of {call.key.shape[-1]}")
    need(call.key.numel() < 2**31, "cache_elements", f"{call.key.numel()} elements")
    longest = max(keys, default=0)
    need(longest <= table.shape[1] * size, "table_columns", f"{table.shape[1]} columns of {size} for {longest} keys")


def _keys(call: Call, tensor: Tensor, request: int, own: slice) -> Tensor:
    if call.table is not None:
        return read_pages(tensor, call.table[request], own.stop - own.start, call.kv_heads, "table_ids")
    return tensor[own] if call.tokens else tensor[request][: own.stop - own.start]
