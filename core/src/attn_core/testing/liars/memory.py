"""Faults of memory: pages, partial pages, slots, scales of a cache, what lies where no token is, and inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import KernelError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import FP8_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.liars.base import FAR_OF_LIARS, Mutant, Result, breaks, position_of_token
from attn_core.testing.liars.masks import with_lengths


@breaks("paged", "memory=shuffled", "memory=descending", "memory=interleaved")
class PageTableIgnored(Mutant):
    """Pages are taken to follow each other from the first one of a sequence."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        columns = torch.arange(batch.page_table.shape[1], device=batch.device, dtype=torch.int32)
        consecutive = (batch.page_table[:, :1] + columns).clamp(max=self.kv_cache.num_pages - 1)
        return replace(batch, page_table=consecutive)


@breaks("far")
class ReadsWhereAddressesWrap(Mutant):
    """The place of a page is computed in as many bits as a smaller pool needs."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        encoder = None if batch.encoder_page_table is None else self._wrapped(batch.encoder_page_table)
        return replace(batch, page_table=self._wrapped(batch.page_table), encoder_page_table=encoder)

    def _wrapped(self, pages: Tensor) -> Tensor:
        stride = self.kv_cache.k(self.kv_cache.layer_ids[0]).stride(0)
        return (pages.long() * stride % (1 << FAR_OF_LIARS) // stride).int()


@breaks("far", "cache_write", "foreign_write")
class WritesWhereAddressesWrap(Mutant):
    """The place of a slot that is written is computed in as many bits as a smaller pool needs."""

    def store(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slots: Tensor) -> None:
        width = self.kv_cache.k(layer.layer_id).stride(0) // self.kv_cache.page_size
        wrapped = slots * width % (1 << FAR_OF_LIARS) // width
        self.write_kv(k, v, layer, torch.where(slots < 0, slots, wrapped))


@breaks("partial_page")
class PartialPageDropped(Mutant):
    """A last page that is not full is not read, once there is a full one."""

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        if batch.mode is not ForwardMode.DECODE:
            return batch
        whole = batch.seq_lens // self.kv_cache.page_size * self.kv_cache.page_size
        return with_lengths(batch, torch.where(whole > 0, whole, batch.seq_lens))


@breaks("partial_page")
class ReadsPastTheEnd(Mutant):
    """The whole last page is read, past the end of the sequence."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if batch.mode is not ForwardMode.DECODE or layer.cross or layer.sliding_window is not None:
            return self.honest(q, layer, batch)
        page = self.kv_cache.page_size
        return self.honest_with_lengths(q, layer, batch, (position_of_token(batch) // page + 1) * page)


@breaks("isolation")
class ZeroTimesWhatIsThere(Mutant):
    """The page after the last is read and weighted with 0, which is not 0 if it holds NaN."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        out, lse = self.honest(q, layer, batch)
        values = self.kv_cache.v_nhd(layer.layer_id, layer.v_head_dim).float()
        return out + (values * 0).sum().to(out.dtype), lse


@breaks("kv_fp8_e4m3")
class KeyScaleDropped(Mutant):
    """The keys of an fp8 cache are read without their scale."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, k_scale=1.0)


@breaks("kv_fp8_e4m3")
class ValueScaleDropped(Mutant):
    """The values of an fp8 cache are read without their scale."""

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        return replace(layer, v_scale=1.0)


@breaks("kv_fp8_e4m3")
class ScaleNotUsedInWriting(Mutant):
    """Keys and values go into an fp8 cache without being divided by their scales."""

    def store(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slots: Tensor) -> None:
        self.write_kv(k, v, replace(layer, k_scale=1.0, v_scale=1.0), slots)


@breaks("saturation")
class NoSaturation(Mutant):
    """What is too large for fp8 becomes NaN instead of the largest number."""

    def store(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slots: Tensor) -> None:
        self.write_kv(k, v, layer, slots)
        if self.kv_cache.dtype not in FP8_DTYPES or v is None:
            return
        written = slots >= 0
        too_large = (v[written].float() / layer.v_scale).abs() > torch.finfo(self.kv_cache.dtype).max
        pool, size = self.kv_cache.v_nhd(layer.layer_id).view(torch.uint8), self.kv_cache.page_size
        page, offset = slots[written] // size, slots[written] % size
        pool[page, offset] = torch.where(too_large, 0x7F, pool[page, offset])


@breaks("attention")
class ReadsBeforeItWrites(Mutant):
    """The step attends first and writes its keys afterwards."""

    def _mutated(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **o: Any) -> Result:
        slots = batch.encoder_slot_mapping if layer.cross else batch.slot_mapping
        save = o.pop("save_kv_cache", True)
        values, lse = self.attend(q, layer, batch.plan_state)
        if save and k is not None and slots is not None:
            self.store(k, v, layer, slots)
        return self.give(values, lse, o.get("return_lse", False), o.get("out"))


@breaks("cache_write", "foreign_write", "holes")
class WritesSlotMinusOne(Mutant):
    """A slot of -1 is the last one of the pool, as in Python."""

    def store(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slots: Tensor) -> None:
        last = self.kv_cache.num_pages * self.kv_cache.page_size - 1
        self.write_kv(k, v, layer, torch.where(slots < 0, last, slots))


@breaks("foreign_write")
class WritesTheNextSlotToo(Mutant):
    """Vectorised stores run one token past the end."""

    def store(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slots: Tensor) -> None:
        last = self.kv_cache.num_pages * self.kv_cache.page_size - 1
        if slots.numel():
            beyond = (slots[-1:] + 1).clamp(max=last)
            self.write_kv(k[-1:], None if v is None else v[-1:], layer, beyond)
        self.write_kv(k, v, layer, slots)


@breaks("decoy", "cache_write", "foreign_write")
class WritesThoughToldNotTo(Mutant):
    """``save_kv_cache=False`` is ignored."""

    def _mutated(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **o: Any) -> Result:
        return super()._mutated(q, k, v, layer, batch, **{**o, "save_kv_cache": True})


@breaks("page_size=48", page_sizes=[16, 48])
class PagesOf48(Mutant):
    """Over-claimed page size: the kernel takes powers of two."""

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        if kv_cache.page_size & (kv_cache.page_size - 1):
            raise KernelError(f"page size {kv_cache.page_size} is not a power of two")
        super().__init__(config, kv_cache)


@breaks("page_size=48", page_sizes=[16, 48])
class PagesOf48RunAs32(Mutant):
    """Over-claimed page size: pages of 48 tokens are walked 32 at a time."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if self.kv_cache.page_size != 48 or layer.cross:
            return self.honest(q, layer, batch)
        return self.honest_with_lengths(q, layer, batch, (position_of_token(batch) + 1) * 2 // 3 + 1)


@breaks("kv_layout=HND")
class HeadsBeforeTokensForgotten(Mutant):
    """The layout HND is read as if its heads were in the other order."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        if self.kv_cache.layout != "HND":
            return self.honest(q, layer, batch)
        sinks = None if layer.sinks is None else layer.sinks.flip(0)
        out, lse = self.honest(q.flip(1), replace(layer, sinks=sinks), batch)
        return out.flip(1), lse.flip(1)


@breaks("inputs")
class ScalesQueriesInPlace(Mutant):
    """q is multiplied by the scale where it lies."""

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        result = self.honest(q, layer, batch)
        q.mul_(layer.scale)
        return result


@breaks("out", "form")
class IgnoresOut(Mutant):
    """The caller's output tensor is not filled."""

    def give(self, values: Tensor, lse: Tensor, return_lse: bool, out: Tensor | None) -> Result:
        return (values, lse) if return_lse else values
