"""The oracle: attention in fp64, written from the definitions of the contract and from nothing else.

It is slow on purpose: one request at a time, every key gathered through the page table, the visibility of every key
written out as a boolean matrix. No backend's code is used; where the contract has a sentence, a line here says it.

Conventions that the sentences leave to be written down:
- a query that sees no key gives 0, with LSE -inf (with a sink: 0, with the sink as LSE);
- LSE is the log of the whole softmax denominator, so it counts the sink;
- a tree's draft tokens stand at prefix length + number of ancestors, keys as well as queries;
- a cross layer has no positions, so a window on it means nothing and is refused, like one on keys that are not causal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attn_core.errors import ConfigError
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.exact_place import exact_place, placed_batch


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One request's attention, gathered: rows of the step, q [n, Hq, Dqk], k [m, Hkv, Dqk], v [m, Hkv, Dv], all fp64.

    ``visible`` [n, m] bool says which key each query sees.
    """

    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor


def reference(q: Tensor, layer: AttentionLayer, batch: ForwardBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
    """``out`` [T, Hq, Dv] and ``lse`` [T, Hq] in fp64, of one layer in one step, from what ``cache`` holds now.

    The step's keys and values must be in the cache already (a forward has run, or ``cache.write``). Rows of padded
    requests mean nothing: 0, or computed from whatever their null pages hold. Raises ConfigError for a window on a
    cross layer.
    """
    return solve(problems(q, layer, batch, cache), q, layer)


def reference_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: AttentionLayer,
    *,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``out`` [T, Hq, Dv] and ``lse`` [T, Hq] in fp64 over given keys k [S, Hkv, Dqk] and values v [S, Hkv, Dv].

    ``causal`` aligns the last query of a request with its last key. Raises ConfigError for a window without ``causal``.
    """
    found = ragged_problems(q, k, v, layer, query_start_loc=query_start_loc, key_start_loc=key_start_loc, causal=causal)
    return solve(found, q, layer)


def solve(found: Iterator[Problem], q: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """The outputs of all ``found`` problems, put into their rows; rows of no problem stay 0, with LSE -inf."""
    place = exact_place(q.device)
    out = torch.zeros(q.shape[0], layer.num_q_heads, layer.v_head_dim, dtype=torch.float64, device=place)
    lse = torch.full(out.shape[:2], float("-inf"), dtype=torch.float64, device=place)
    for problem in found:
        scores = masked_scores(problem, layer)
        probabilities, lse[problem.rows] = softmax_with_sink(scores, layer)
        out[problem.rows] = weighted_values(probabilities, problem.v)
    return out, lse


def masked_scores(problem: Problem, layer: AttentionLayer) -> Tensor:
    """[Hkv, G, n, m]: scale * q.k, then the soft cap, then -inf for the keys that are not seen."""
    n, _, width = problem.q.shape
    grouped = problem.q.reshape(n, layer.num_kv_heads, layer.group_size, width)
    scores = layer.scale * torch.einsum("nhgd,mhd->hgnm", grouped, problem.k)
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    return scores.masked_fill(~problem.visible, float("-inf"))


def softmax_with_sink(scores: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    """Probabilities [Hkv, G, n, m] and LSE [n, Hq]; the sink is one more logit of the denominator."""
    kv_heads, group, n, _ = scores.shape
    logits = scores
    if layer.sinks is not None:
        sink = layer.sinks.to(scores).reshape(kv_heads, group, 1, 1).expand(kv_heads, group, n, 1)
        logits = torch.cat([scores, sink], dim=-1)
    if logits.shape[-1] == 0:
        return scores, scores.new_full((n, kv_heads * group), float("-inf"))
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    probabilities = torch.where(scores == float("-inf"), 0.0, torch.exp(scores - lse))
    return probabilities, lse.squeeze(-1).reshape(kv_heads * group, n).transpose(0, 1)


def weighted_values(probabilities: Tensor, v: Tensor) -> Tensor:
    """[n, Hq, Dv]: the sum of the values v [m, Hkv, Dv], weighted by probabilities [Hkv, G, n, m]."""
    return torch.einsum("hgnm,mhd->nhgd", probabilities, v).flatten(1, 2)


def problems(q: Tensor, layer: AttentionLayer, batch: ForwardBatch, cache: KVCache) -> Iterator[Problem]:
    """Each request of a step, gathered through its page table."""
    if layer.cross and layer.sliding_window is not None:
        raise ConfigError(
            f"layer {layer.layer_id}: a window of {layer.sliding_window} on a cross layer",
            accepted="cross layers without a window: encoder keys have no position relative to the query",
        )
    q, batch = q.to(exact_place(q.device)), placed_batch(batch)
    for b, (first, last) in enumerate(pairwise(batch.query_start_loc.tolist())):
        if last == first:
            continue
        if last - first > int(batch.seq_lens[b]):
            continue  # a padded request of a captured graph
        if layer.cross:
            assert batch.encoder_seq_lens is not None, "a cross layer in a batch without encoder_seq_lens"
            assert batch.encoder_page_table is not None, "a cross layer in a batch without encoder_page_table"
            num_keys = int(batch.encoder_seq_lens[b])
            pages = batch.encoder_page_table[b]
            visible = torch.ones(last - first, num_keys, dtype=torch.bool, device=q.device)
        else:
            num_keys = int(batch.seq_lens[b])
            pages = batch.page_table[b]
            visible = visible_keys(b, last - first, num_keys, layer.sliding_window, batch)
        k, v = gather(cache, layer, pages, num_keys)
        yield Problem(slice(first, last), q[first:last].double(), k, v, visible)


def ragged_problems(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: AttentionLayer,
    *,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    causal: bool,
) -> Iterator[Problem]:
    """Each request of a ragged call."""
    if layer.sliding_window is not None and not causal:
        raise ConfigError(
            f"layer {layer.layer_id}: a window of {layer.sliding_window} on keys that are not causal",
            accepted="a window with causal=True",
        )
    q, k, v = (t.to(exact_place(t.device)) for t in (q, k, v))
    queries, keys = pairwise(query_start_loc.tolist()), pairwise(key_start_loc.tolist())
    for (first, last), (first_key, last_key) in zip(queries, keys, strict=True):
        n, m = last - first, last_key - first_key
        if n == 0:
            continue
        visible = torch.ones(n, m, dtype=torch.bool, device=q.device)
        if causal:
            position = torch.arange(m - n, m, device=q.device)[:, None]
            visible = causal_window(position, torch.arange(m, device=q.device)[None, :], layer.sliding_window)
        own = slice(first_key, last_key)
        yield Problem(slice(first, last), q[first:last].double(), k[own].double(), v[own].double(), visible)


def causal_window(position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """A query at p sees keys 0..p; with a window W, keys max(0, p-W+1)..p."""
    seen = key_position <= position
    return seen if window is None else seen & (key_position > position - window)


def visible_keys(b: int, n: int, m: int, window: int | None, batch: ForwardBatch) -> Tensor:
    """[n, m] bool: which of the m keys of request b each of its n new tokens sees."""
    device = batch.device
    prefix = m - n
    key_position = torch.arange(m, device=device)
    if batch.tree is not None:
        depth = batch.tree.visible[b].sum(-1) - 1
        key_position = torch.cat([key_position[:prefix], prefix + depth])
    position = key_position[prefix:]
    if batch.tree is None:
        seen = key_position[None, :] <= position[:, None]
    else:
        whole_prefix = torch.ones(n, prefix, dtype=torch.bool, device=device)
        seen = torch.cat([whole_prefix, batch.tree.visible[b]], dim=1)
    if batch.spans is not None:
        seen = seen | in_one_span(position, key_position, batch.spans[b])
    if window is not None:
        seen = seen & (key_position[None, :] > position[:, None] - window)
    return seen


def in_one_span(position: Tensor, key_position: Tensor, spans: Tensor) -> Tensor:
    """[n, m] bool: query and key lie in the same half-open span of ``spans`` [S, 2]."""
    shared = torch.zeros(position.shape[0], key_position.shape[0], dtype=torch.bool, device=position.device)
    for start, stop in spans.tolist():
        query_inside = (position >= start) & (position < stop)
        key_inside = (key_position >= start) & (key_position < stop)
        shared |= query_inside[:, None] & key_inside[None, :]
    return shared


def gather(cache: KVCache, layer: AttentionLayer, pages: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` keys [count, Hkv, Dqk] and values [count, Hkv, Dv] of a sequence in ``pages``, fp64.

    What an fp8 cache stores is multiplied by k_scale (v_scale). MLA: values are the first Dv of the latent row.
    """
    index = torch.arange(count, device=pages.device)
    page, offset = pages[index // cache.page_size].long(), index % cache.page_size
    k = stored_rows(cache.k(layer.layer_id), cache.layout, page, offset) * layer.k_scale
    if cache.layout == "MLA":
        return k, k[..., : layer.v_head_dim]
    values = cache.v(layer.layer_id)
    assert values is not None, f"layer {layer.layer_id} has no values in a {cache.layout} cache"
    return k, stored_rows(values, cache.layout, page, offset) * layer.v_scale


def stored_rows(pool: Tensor, layout: str, page: Tensor, offset: Tensor) -> Tensor:
    """[count, H, D] fp64: the rows of ``pool`` at these pages and offsets, whatever its layout, unscaled."""
    bits = pool.view(torch.uint8) if pool.dtype in FP8_DTYPES else pool
    page, offset = page.to(pool.device), offset.to(pool.device)
    if layout == "NHD":
        rows = bits[page, offset]
    elif layout == "HND":
        rows = bits[page, :, offset]
    else:
        rows = bits[page, offset][:, None, :]
    rows = rows.to(exact_place(pool.device))
    return (rows.view(pool.dtype) if pool.dtype in FP8_DTYPES else rows).double()
