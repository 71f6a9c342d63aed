"""One eager step: its page indices, its masks, and one planned wrapper for each shape of layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from attn_core.errors import BatchError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import KVCache
from torch import Tensor

from attn_flashinfer.choice import LayerShape, Route, route
from attn_flashinfer.library import errors_of, load
from attn_flashinfer.masks import MaskPlan, pack
from attn_flashinfer.page_indices import PageIndices, on_host
from attn_flashinfer.wrappers import WrapperPool, workspace


@dataclass(slots=True, eq=False, weakref_slot=True)
class Step:
    """What `init_forward_metadata` leaves on the batch: ``wrappers`` by layer shape, planned for this batch.

    It does not hold the batch: a circle of the two would keep the wrappers lent until a collection.
    """

    keys: PageIndices
    encoder_keys: PageIndices | None
    wrappers: dict[LayerShape, Any] = field(default_factory=dict)


class StepPlanner:
    """Plans eager steps of one backend: which wrapper, from the pool, with which arguments."""

    def __init__(self, config: AttentionConfig, cache: KVCache) -> None:
        self._config = config
        self._cache = cache
        self._library = load()
        self._pool = WrapperPool()

    def step(self, batch: ForwardBatch) -> Step:
        """The page indices of ``batch``; wrappers are planned by `wrapper`, once a shape."""
        page_size = self._cache.page_size
        on_host(batch.query_start_loc_cpu, "query_start_loc_cpu")
        encoder = None
        if batch.encoder_seq_lens is not None and batch.encoder_page_table is not None:
            lens = on_host(batch.encoder_seq_lens_cpu, "encoder_seq_lens_cpu")
            encoder = PageIndices.of(lens, batch.encoder_page_table, page_size)
        return Step(PageIndices.of(batch.seq_lens_cpu, batch.page_table, page_size), encoder)

    def wrapper(self, batch: ForwardBatch, step: Step, shape: LayerShape) -> Any:
        """The wrapper for layers of ``shape`` in this step of ``batch``, planned when first asked for.

        Raises KernelError for what the library cannot do, BatchError for a cross layer without encoder keys.
        """
        found = step.wrappers.get(shape)
        if found is None:
            found = step.wrappers[shape] = self._planned(batch, step, shape)
        return found

    def _planned(self, batch: ForwardBatch, step: Step, shape: LayerShape) -> Any:
        way = route(shape, batch, self._config, self._cache.device)
        made_for = (way.decode, way.kernels)
        lent = self._pool.lend(made_for, lambda: self._new_wrapper(way), step)
        keys = keys_of(step, shape)
        options = plan_options(shape, way, self._config, self._cache)
        with errors_of(f"planning {batch.mode.name}"):
            if way.decode:
                lent.plan(lent.wrapper.plan, keys.indptr, keys.indices, keys.last_page_len, **options)
            else:
                mask = self._mask(batch, step, shape) if way.masked else None
                lent.plan(
                    lent.wrapper.plan,
                    batch.query_start_loc_cpu,
                    keys.indptr,
                    keys.indices,
                    keys.last_page_len,
                    packed_custom_mask=None if mask is None else mask[0],
                    causal=way.causal,
                    **options,
                )
                if mask is not None:
                    # plan() counts these starts in bits when it is given packed bytes; its kernels count bytes
                    lent.wrapper._mask_indptr_buf.copy_(mask[1])
        return lent.wrapper

    def _new_wrapper(self, way: Route) -> Any:
        options: dict[str, Any] = {"kv_layout": self._cache.layout, "backend": way.kernels}
        with errors_of("a new wrapper"):
            if way.decode:
                return self._library.decode_wrapper(workspace(self._cache.device), use_tensor_cores=True, **options)
            return self._library.prefill_wrapper(workspace(self._cache.device), **options)

    def _mask(self, batch: ForwardBatch, step: Step, shape: LayerShape) -> tuple[Tensor, Tensor]:
        """(packed uint8, byte_starts [B + 1] int32), both on the device."""
        starts = on_host(batch.query_start_loc_cpu, "query_start_loc_cpu").numpy()
        plan = MaskPlan.of(starts[1:] - starts[:-1], step.keys.lens.numpy())
        packed = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=batch.device)
        byte_starts = plan.byte_starts.to(batch.device, non_blocking=True)
        pack(batch, shape.window, byte_starts, packed, longest=plan.longest)
        return packed, byte_starts


def keys_of(step: Step, shape: LayerShape) -> PageIndices:
    """The step's own keys, or the encoder's for a cross layer. Raises BatchError if the batch has none."""
    if not shape.cross:
        return step.keys
    if step.encoder_keys is None:
        raise BatchError("a cross layer in a batch without encoder_seq_lens and encoder_page_table")
    return step.encoder_keys


def plan_options(shape: LayerShape, way: Route, config: AttentionConfig, cache: KVCache) -> dict[str, Any]:
    """What every plan is told of layers of ``shape``. FlashInfer's ``window_left`` w keeps w + 1 keys."""
    head_dim = {"head_dim": shape.qk_head_dim} if way.decode else {"head_dim_qk": shape.qk_head_dim}
    windowed = shape.window is not None and not way.masked
    return {
        "num_qo_heads": shape.num_q_heads,
        "num_kv_heads": shape.num_kv_heads,
        **head_dim,
        "page_size": cache.page_size,
        "sm_scale": shape.scale,
        "window_left": shape.window - 1 if windowed and shape.window is not None else -1,
        "logits_soft_cap": shape.softcap,
        "q_data_type": getattr(torch, config.dtype),
        "kv_data_type": cache.dtype,
    }
