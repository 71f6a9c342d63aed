"""The backend `fa3`: FlashAttention 3 over the paged cache, every phase of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_fa3.build_flags import BuildFlags
from attn_fa3.graph_buffers import GraphBuffers, fixed_splits
from attn_fa3.join import join
from attn_fa3.library import load, raised
from attn_fa3.queries import Quantized, quantize
from attn_fa3.step import Keys, Shape, Step
from attn_fa3.tree import OwnKeys, own_keys, prefix_window

Attended = tuple[Tensor, Tensor]


class Pools(NamedTuple):
    """One layer's cache as the library takes it: k [pages, page, Hkv, D], v [pages, page, Hkv, Dv], by strides."""

    k: Tensor
    v: Tensor

    def as_slots(self) -> Pools:
        """The same memory as pages of one token, [slots, 1, Hkv, D]; pages begin `page_stride` slots apart."""
        return Pools(_as_slots(self.k), _as_slots(self.v))

    @property
    def page_stride(self) -> int:
        """Slots from one page to the next."""
        return self.k.stride(0) // self.k.stride(1)


class FA3Backend(AttentionBackend):
    """FlashAttention 3. Takes the page table natively: decode, extend, mixed batches, chains of drafts are one call.

    A tree of drafts is two calls over disjoint keys and a merge. Absorbed MLA goes through ``qv``, if the build has it.
    """

    name = "fa3"
    cuda_graph_seq_len_fill_value = 0

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._library = load()
        self._num_splits = 1 if config.batch_invariant else 0
        self._graphs: GraphBuffers | None = None
        self._pools: dict[int, Pools] = {}
        self._fp8 = kv_cache.dtype == torch.float8_e4m3fn
        self._cache_scales: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        try:
            flags = BuildFlags.installed()
        except (ImportError, AttributeError, KeyError) as error:
            unknown = f"no flash_attn_config that says so ({error})"
            return (reason("build_unsupported", "flash_attn_config", "a build that says what is in it", unknown),)
        return tuple(flags.refusals(config, phase))

    def warmup(self, config: AttentionConfig) -> None:
        """The kernels of the library are compiled; ours, for trees and sinks, are compiled here."""
        if self.kv_cache.device.type != "cuda":
            return
        for kind in config.layers:
            part = torch.zeros(1, kind.num_q_heads, kind.v_head_dim, dtype=_dtype(config), device=self.kv_cache.device)
            lse = part.new_zeros(1, kind.num_q_heads, dtype=torch.float32)
            sinks = part.new_zeros(kind.num_q_heads) if kind.sinks else None
            if sinks is not None:
                join((part, lse), None, sinks, return_lse=config.lse)
            if "verify" in config.phases and config.speculative_eagle_topk > 1:
                join((part, lse), (part, lse), sinks, return_lse=config.lse)

    # -- the step ------------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        batch.plan_state = Step.of(batch, self.kv_cache.page_size, num_splits=self._num_splits)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        self._graphs = GraphBuffers(self.config, self.kv_cache, max_batch_size)
        self.warmup(self.config)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        captured = self._graph_buffers().capture(batch)
        splits = fixed_splits(self.config, batch.num_tokens)
        batch.plan_state = Step.of(captured, self.kv_cache.page_size, num_splits=splits, in_graph=True)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        """Three copies into the shared buffers; the schedules are made inside the graph."""
        self._graph_buffers().refill(batch)

    def _graph_buffers(self) -> GraphBuffers:
        if self._graphs is None:
            raise BatchError("no graph state", hint="call init_cuda_graph_state first")
        return self._graphs

    # -- the layer -----------------------------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_extend(q, k, v, layer, batch, save_kv_cache=save_kv_cache, return_lse=return_lse, out=out)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if save_kv_cache and k is not None:
            slots = batch.encoder_slot_mapping if layer.cross else batch.slot_mapping
            if slots is not None:
                self.kv_cache.write(layer, slots, k, v)
        if not q.shape[0]:
            return _nothing(q, layer, return_lse)
        step = cast(Step, batch.plan_state)
        if step.tree is not None and not layer.cross:
            return self._verify_tree(q, layer, step, step.tree.visible, return_lse, out)
        keys = step.keys
        if layer.cross:
            if step.encoder_keys is None:
                raise BatchError("a cross layer in a batch without encoder_seq_lens and encoder_page_table")
            keys = step.encoder_keys
        window = (-1, -1) if layer.sliding_window is None else (layer.sliding_window - 1, 0)
        fused = self._sinks_fused(layer, return_lse)
        found = self._attend(
            q, layer, step, keys, window=window, causal=not layer.cross, out=out, sinks=layer.sinks if fused else None
        )
        return _finish(found, None if fused else layer.sinks, return_lse)

    def forward_ragged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: AttentionLayer,
        *,
        query_start_loc: Tensor,
        key_start_loc: Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if layer.sliding_window is not None and not causal:
            raise ConfigError(
                f"layer {layer.layer_id}: a window of {layer.sliding_window} on keys that are not causal",
                accepted="a window with causal=True",
            )
        if not q.shape[0]:
            return _nothing(q, layer, return_lse)
        fused = self._sinks_fused(layer, return_lse)
        options = {"sinks": layer.sinks} if fused else {}
        try:
            result = self._library.forward(
                q=q,
                k=k,
                v=v,
                out=out,
                cu_seqlens_q=query_start_loc,
                cu_seqlens_k=key_start_loc,
                max_seqlen_q=max_query_len,
                max_seqlen_k=max_key_len,
                softmax_scale=layer.scale,
                is_causal=causal,
                window_size_left=-1 if layer.sliding_window is None else layer.sliding_window - 1,
                window_size_right=-1 if layer.sliding_window is None else 0,
                softcap=layer.softcap,
                num_splits=1,
                **options,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise raised(error, "ragged forward") from error
        return _finish((result[0], result[1].t()), None if fused else layer.sinks, return_lse)

    def _sinks_fused(self, layer: AttentionLayer, return_lse: bool) -> bool:
        """Whether the library takes the sinks itself: it reads them as bfloat16, and its LSE does not count them."""
        return (
            layer.sinks is not None
            and self._library.has_sinks
            and layer.sinks.dtype == torch.bfloat16
            and not return_lse
        )

    def _verify_tree(
        self, q: Tensor, layer: AttentionLayer, step: Step, visible: Tensor, return_lse: bool, out: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All drafts over the prefix, each over the keys only it sees, joined."""
        drafts, window = visible.shape[1], layer.sliding_window
        pools = self._pools_of(layer)

        def make() -> tuple[Keys, OwnKeys]:
            prefix = (step.keys.lens - drafts).clamp_(min=0)
            own = own_keys(
                visible, prefix, step.keys.page_table,
                page_size=self.kv_cache.page_size, page_stride=pools.page_stride, window=window,
            )  # fmt: skip
            return Keys(prefix, step.keys.page_table, step.keys.max_len), own

        made = step.trees.get((window, pools.page_stride), layer.layer_id, make)
        prefix_keys, own = cast("tuple[Keys, OwnKeys]", made)
        second = self._attend_own(q, layer, own, step)
        left_right = prefix_window(window, drafts)
        if left_right is None:
            first, rest = second, None
        else:
            first, rest = self._attend(q, layer, step, prefix_keys, window=left_right, causal=False), second
        joined, lse = join(first, rest, layer.sinks, out=out, return_lse=return_lse)
        return (joined, cast(Tensor, lse)) if return_lse else joined

    def _attend(
        self,
        q: Tensor,
        layer: AttentionLayer,
        step: Step,
        keys: Keys,
        *,
        window: tuple[int, int],
        causal: bool,
        out: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Attended:
        """out [T, Hq, Dv] and lse [T, Hq] of this step's queries over ``keys``."""
        mla = layer.kind == "mla"
        pools = self._pools_of(layer)
        shape = Shape(
            layer.num_q_heads,
            layer.num_kv_heads,
            pools.k.shape[-1],
            pools.v.shape[-1],
            window,
            causal,
            layer.softcap > 0,
        )
        schedule = step.schedules.get(
            (shape, keys is step.encoder_keys, causal), layer.layer_id, lambda: self._schedule(step, keys, shape)
        )
        uniform = step.query_len
        options = {} if sinks is None else {"sinks": sinks}
        if self._fp8:
            quantized = self._quantize(q, layer, step)
            q = quantized.q
            options |= self._descales(layer, quantized.descale)
        if mla:
            nope = q[..., : layer.v_head_dim]
            options["q_v"] = nope if uniform is None else nope.view(step.batch_size, uniform, *nope.shape[1:])
            q = q[..., layer.v_head_dim :]
        target = out
        if uniform is not None:
            q = q.view(step.batch_size, uniform, *q.shape[1:])
            target = None if out is None else out.view(step.batch_size, uniform, *out.shape[1:])
        try:
            result = self._library.forward(
                q=q,
                k=pools.k,
                v=pools.v,
                out=target,
                cu_seqlens_q=step.query_start_loc if uniform is None else None,
                max_seqlen_q=step.max_query_len if uniform is None else None,
                seqused_k=keys.lens,
                page_table=keys.page_table,
                softmax_scale=layer.scale,
                is_causal=causal,
                window_size_left=window[0],
                window_size_right=window[1],
                softcap=layer.softcap,
                scheduler_metadata=schedule,
                num_splits=step.num_splits,
                **options,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise raised(error, f"layer {layer.layer_id}") from error
        rows, lse = _rows(result[0], result[1], uniform is not None)
        return (rows if out is None else out), lse

    def _attend_own(self, q: Tensor, layer: AttentionLayer, own: OwnKeys, step: Step) -> Attended:
        """Each draft as a request of one token, over the slots listed for it."""
        pools = self._pools_of(layer).as_slots()
        options: dict[str, Tensor] = {}
        if self._fp8:
            quantized = self._quantize(q, layer, step)
            q = quantized.q
            options = self._descales(layer, quantized.descale.repeat_interleave(q.shape[0] // step.batch_size, 0))
        rope = q
        if layer.kind == "mla":
            options["q_v"] = q[:, None, :, : layer.v_head_dim]
            rope = q[..., layer.v_head_dim :]
        try:
            result = self._library.forward(
                q=rope.unsqueeze(1),
                k=pools.k,
                v=pools.v,
                seqused_k=own.counts,
                page_table=own.slots,
                softmax_scale=layer.scale,
                is_causal=False,
                softcap=layer.softcap,
                num_splits=1,
                **options,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise raised(error, f"layer {layer.layer_id}, the drafts of a tree") from error
        return _rows(result[0], result[1], True)

    def _schedule(self, step: Step, keys: Keys, shape: Shape) -> Tensor:
        """The tile schedule of every layer of ``shape`` in this step: one small kernel instead of one a layer."""
        uniform = step.query_len
        try:
            return self._library.schedule(
                batch_size=step.batch_size,
                max_seqlen_q=step.max_query_len if uniform is None else uniform,
                max_seqlen_k=keys.max_len,
                num_heads=shape.num_q_heads,
                num_heads_k=shape.num_kv_heads,
                headdim=shape.qk_head_dim,
                headdim_v=shape.v_head_dim,
                qkv_dtype=self.kv_cache.dtype,
                seqused_k=keys.lens,
                cu_seqlens_q=step.query_start_loc if uniform is None else None,
                page_size=self.kv_cache.page_size,
                is_causal=shape.causal,
                window_size_left=shape.window[0],
                window_size_right=shape.window[1],
                has_softcap=shape.has_softcap,
                num_splits=step.num_splits,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise raised(error, "tile schedule") from error

    def _quantize(self, q: Tensor, layer: AttentionLayer, step: Step) -> Quantized:
        starts = step.query_start_loc if step.query_len is None else None
        return quantize(q, layer.num_kv_heads, step.batch_size, starts)

    def _descales(self, layer: AttentionLayer, q_descale: Tensor) -> dict[str, Tensor]:
        """What the stored keys and values, and the quantised queries [B, Hkv], are multiplied with."""
        found = self._cache_scales.get(layer.layer_id)
        if found is None:
            one = q_descale.new_ones(1, 1)
            found = self._cache_scales[layer.layer_id] = (one * layer.k_scale, one * layer.v_scale)
        k_descale, v_descale = (scale.expand_as(q_descale) for scale in found)
        return {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}

    def _pools_of(self, layer: AttentionLayer) -> Pools:
        found = self._pools.get(layer.layer_id)
        if found is None:
            k = self.kv_cache.k_nhd(layer.layer_id)
            v = self.kv_cache.v_nhd(layer.layer_id, layer.v_head_dim)
            found = Pools(k[..., layer.v_head_dim :], v) if layer.kind == "mla" else Pools(k, v)
            self._pools[layer.layer_id] = found
        return found


def _as_slots(pool: Tensor) -> Tensor:
    """[pages, page, H, D] as [slots, 1, H, D]; a page must begin a whole number of tokens after the one before."""
    page, token, head, _ = pool.stride()
    if page % token:
        raise ConfigError(
            f"pages {page} elements apart, tokens {token}: no slot numbering fits",
            accepted="pages a whole number of tokens apart, for tree verify",
        )
    count = (pool.shape[0] - 1) * (page // token) + pool.shape[1]
    return pool.as_strided((count, 1, *pool.shape[2:]), (token, token, head, 1), pool.storage_offset())


def _rows(out: Tensor, lse: Tensor, uniform: bool) -> Attended:
    """From the library's [B, S, H, Dv] and [B, H, S] (or [T, H, Dv] and [H, T]) to [T, H, Dv] and [T, H]."""
    if not uniform:
        return out, lse.t()
    lse = lse.squeeze(2) if lse.shape[2] == 1 else lse.transpose(1, 2).flatten(0, 1)
    return out.flatten(0, 1), lse


def _finish(found: Attended, sinks: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Fold sinks that the library was not given into what it returned."""
    if sinks is not None:
        out, lse = join(found, None, sinks, out=found[0], return_lse=return_lse)
        found = (out, cast(Tensor, lse))
    return found if return_lse else found[0]


def _nothing(q: Tensor, layer: AttentionLayer, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    out = q.new_empty(0, layer.num_q_heads, layer.v_head_dim)
    return (out, q.new_empty(0, layer.num_q_heads, dtype=torch.float32)) if return_lse else out


def _dtype(config: AttentionConfig) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, config.dtype))
