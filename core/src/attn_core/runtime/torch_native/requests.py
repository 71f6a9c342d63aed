"""RequestsStep: attention request by request: prompts with or without a prefix, drafts, cross, ragged keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.maths import NEG_INF, attend, empty_state
from attn_core.runtime.torch_native.pages import read_tokens
from attn_core.runtime.torch_native.step import missing_encoder
from attn_core.runtime.torch_native.visibility import seen_by

#: Queries that share a mask and a range of keys: long enough for the kernels, short enough to leave out hidden keys.
BLOCK_QUERIES: Final = 256
#: Elements of a mask, and of the scores where they are held, at a time.
MASK_ELEMENTS: Final = 1 << 22
SCORE_ELEMENTS: Final = 1 << 24

Result = tuple[Tensor, Tensor | None]


@dataclass(slots=True)
class RequestsStep:
    """The lengths of a step as host integers; ``query_start`` [B + 1], ``seq_lens`` [B]."""

    batch: ForwardBatch
    slot_mapping: Tensor
    query_start: list[int]
    seq_lens: list[int]
    encoder_seq_lens: list[int] | None

    @classmethod
    def of(cls, batch: ForwardBatch) -> RequestsStep:
        """From the batch's host copies; without them the device is read once."""
        return cls(
            batch=batch,
            slot_mapping=batch.slot_mapping,
            query_start=_host(batch.query_start_loc_cpu, batch.query_start_loc),
            seq_lens=_host(batch.seq_lens_cpu, batch.seq_lens),
            encoder_seq_lens=None
            if batch.encoder_seq_lens is None
            else _host(batch.encoder_seq_lens_cpu, batch.encoder_seq_lens),
        )

    def attend(self, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool) -> Result:
        parts: list[Result] = []
        for b, (start, stop) in enumerate(zip(self.query_start, self.query_start[1:], strict=False)):
            if stop > start:
                parts.append(self._attend_one(b, q[start:stop], layer, kv_cache, need_lse))
        return _joined(parts, q, layer)

    def _attend_one(self, b: int, q: Tensor, layer: AttentionLayer, kv_cache: KVCache, need_lse: bool) -> Result:
        if layer.cross:
            if self.encoder_seq_lens is None or self.batch.encoder_page_table is None:
                raise missing_encoder(layer)
            k, v = read_tokens(kv_cache, layer, self.batch.encoder_page_table[b], 0, self.encoder_seq_lens[b])
            return attend_keys(q, k, v, layer, Sight(causal=False), need_lse)
        length, prefix = q.shape[0], self.seq_lens[b] - q.shape[0]
        if prefix < 0:  # a padded request: its rows mean nothing
            return empty_state(length, layer.num_q_heads, layer.v_head_dim, device=q.device)
        tree = None if self.batch.tree is None else self.batch.tree.visible[b]
        window = layer.sliding_window
        first = 0 if window is None else max(0, prefix - window + 1)
        k, v = read_tokens(kv_cache, layer, self.batch.page_table[b], first, self.seq_lens[b])
        spans = None if self.batch.spans is None else self.batch.spans[b] - first
        return attend_keys(q, k, v, layer, Sight(window=window, tree=tree, spans=spans), need_lse)


def _host(copy: Tensor | None, original: Tensor) -> list[int]:
    values: list[int] = (original if copy is None else copy).tolist()
    return values


def _joined(parts: list[Result], q: Tensor, layer: AttentionLayer) -> Result:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return empty_state(0, layer.num_q_heads, layer.v_head_dim, device=q.device)
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts]), torch.cat(lses) if len(lses) == len(parts) else None


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: AttentionLayer,
    queries: list[int],
    keys: list[int],
    causal: bool,
    need_lse: bool,
) -> Result:
    """Request b has queries ``queries[b]:queries[b + 1]`` and keys likewise; the last query stands at the last key."""
    sight = Sight(causal=causal, window=layer.sliding_window)
    parts: list[Result] = []
    for b in range(len(queries) - 1):
        if queries[b + 1] > queries[b]:
            own = slice(keys[b], keys[b + 1])
            parts.append(attend_keys(q[queries[b] : queries[b + 1]], k[own], v[own], layer, sight, need_lse))
    return _joined(parts, q, layer)


@dataclass(slots=True)
class Sight:
    """What the L queries of one request see of its S keys; the last query stands at the last key.

    ``tree`` [L, L] bool, ``spans`` [n, 2] in places of the keys given. ``causal`` False sees every key.
    """

    causal: bool = True
    window: int | None = None
    tree: Tensor | None = None
    spans: Tensor | None = None

    def is_plain(self, keys: int) -> bool:
        """Whether causality is all there is: the window, if any, hides none of ``keys`` keys."""
        return self.tree is None and self.spans is None and (self.window is None or self.window >= keys)

    def keys_of(self, start: int, stop: int, prefix: int, keys: int) -> tuple[int, int]:
        """The range of keys that queries ``start`` to ``stop - 1`` may see."""
        first = 0 if self.window is None or self.tree is not None else max(0, prefix + start - self.window + 1)
        simple = self.causal and self.tree is None and self.spans is None
        return first, (max(first, prefix + stop) if simple else keys)

    def mask(self, start: int, stop: int, prefix: int, first: int, last: int, device: torch.device) -> Tensor | None:
        """[stop - start, last - first] bool, or None where everything is seen."""
        if not self.causal and self.window is None:
            return None
        queries = torch.arange(prefix + start, prefix + stop, device=device)
        keys = torch.arange(first, last, device=device)
        drafts = None
        if self.tree is not None:
            depth = self.tree.sum(-1) - 1
            queries = prefix + depth[start:stop]
            keys = torch.cat([keys[: prefix - first], prefix + depth])
            drafts = pad(self.tree[start:stop], (prefix - first, 0))
        return seen_by(
            queries,
            keys,
            window=self.window,
            spans=self.spans,
            drafts=drafts,
            first_draft=prefix,
            causal=self.causal,
        )


def attend_keys(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, sight: Sight, need_lse: bool) -> Result:
    """``(out, lse)``, [L, Hq, Dv] and fp32 [L, Hq], without the sink: q [L, Hq, D], k [S, Hkv, D], v [S, Hkv, Dv].

    The fused kernels of torch where they compute exactly this, else scores block by block.
    """
    hidden = q.shape[0] - k.shape[0]
    if not k.shape[0] or (sight.causal and hidden > 0):
        return _with_blind(q, k, v, layer, sight, hidden if k.shape[0] else q.shape[0])
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    fused = not layer.softcap and layer.qk_head_dim == layer.v_head_dim
    if fused and q.device.type == "cpu":
        return _fused_on_cpu(q, k, v, layer, sight)
    if fused and not need_lse and sight.causal and sight.is_plain(k.shape[0]) and _fused_elsewhere(q):
        return _sdpa(q, k, v, layer), None
    return _by_blocks(q, k, v, layer, sight)


def _with_blind(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, sight: Sight, blind: int) -> Result:
    """Where the first ``blind`` queries stand before every key."""
    out, lse = empty_state(blind, layer.num_q_heads, layer.v_head_dim, device=q.device)
    if blind == q.shape[0]:
        return out, lse
    rest, rest_lse = attend_keys(q[blind:], k, v, layer, sight, need_lse=True)
    assert rest_lse is not None
    return torch.cat([out, rest.float()]), torch.cat([lse, rest_lse])


def _fused_on_cpu(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, sight: Sight) -> Result:
    """The flash kernel behind ``scaled_dot_product_attention`` on a CPU, which gives the natural-log LSE as well."""
    length, keys = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if not sight.causal or (sight.is_plain(keys) and length == keys):
        out, lse = kernel(q, k, v, 0.0, sight.causal, scale=layer.scale)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    outs, lses = [], []
    for start, stop, first, last in _blocks(length, keys, sight, MASK_ELEMENTS // keys):
        seen = sight.mask(start, stop, keys - length, first, last, q.device)
        bias = None if seen is None else torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, NEG_INF)
        out, lse = kernel(
            q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], 0.0, False, attn_mask=bias, scale=layer.scale
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def _blocks(length: int, keys: int, sight: Sight, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of queries, ``most`` at a time or BLOCK_QUERIES: first and last query, first and last key they may see."""
    size = max(1, min(BLOCK_QUERIES, most))
    for start in range(0, length, size):
        stop = min(length, start + size)
        yield start, stop, *sight.keys_of(start, stop, keys - length, keys)


def _fused_elsewhere(q: Tensor) -> bool:
    """Whether torch has a kernel on q's device that never holds all scores at once."""
    return q.device.type == "cuda" and q.dtype is not torch.float32 and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
    """Causal, the last query at the last key."""
    from torch.nn.attention.bias import causal_lower_right  # two seconds: it imports torch's compiler

    bias = causal_lower_right(q.shape[0], k.shape[0])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: Tensor = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=layer.scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, sight: Sight) -> Result:
    """The definition, a block of queries at a time."""
    length, keys = q.shape[0], k.shape[0]
    k, v = k.float(), v.float()
    outs, lses = [], []
    for start, stop, first, last in _blocks(length, keys, sight, SCORE_ELEMENTS // (layer.num_q_heads * keys)):
        seen = sight.mask(start, stop, keys - length, first, last, q.device)
        out, lse = attend(
            q[None, start:stop],
            k[None, first:last],
            v[None, first:last],
            layer,
            None if seen is None else seen[None],
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses)
