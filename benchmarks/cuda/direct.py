"""The libraries called directly, with the metadata that our backend made: what a layer must not cost more than."""

from __future__ import annotations

from collections.abc import Callable

from attn_core.bench.run import Workload
from attn_core.runtime.backend import AttentionBackend
from torch import Tensor


def direct_call(name: str, work: Workload, backend: AttentionBackend) -> Callable[[], object]:
    """The library's own function on the workload; ``backend`` has initialised the workload's batch."""
    return {
        "fa3": _fa3,
        "fa4": _fa4,
        "flashinfer": _flashinfer,
        "flashinfer_mla": _flashinfer_mla,
        "flashmla": _flashmla,
    }[name](work, backend)


def _fa3(work: Workload, backend: AttentionBackend) -> Callable[[], object]:
    import flash_attn_interface as fa

    backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False)  # makes the schedule
    step = work.batch.plan_state
    ((_, schedule),) = step.schedules.made.values()
    k, v = work.cache.k_nhd(0), work.cache.v_nhd(0)
    options: dict[str, object] = {"cu_seqlens_q": step.query_start_loc, "max_seqlen_q": step.max_query_len}
    q = work.q
    if step.query_len is not None:
        q, options = q.unflatten(0, (step.batch_size, step.query_len)), {}

    def call() -> Tensor:
        return fa.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=step.keys.lens, page_table=step.keys.page_table, softmax_scale=work.layer.scale,
            causal=True, scheduler_metadata=schedule, num_splits=step.num_splits, **options,
        )  # fmt: skip

    return call


def _fa4(work: Workload, backend: AttentionBackend) -> Callable[[], object]:
    from flash_attn.cute import flash_attn_varlen_func

    step = work.batch.plan_state
    k, v = work.cache.k_nhd(0), work.cache.v_nhd(0)
    options: dict[str, object] = {"cu_seqlens_q": step.query_start_loc, "max_seqlen_q": step.max_query_len}
    q = work.q
    if step.query_len is not None:
        q, options = q.unflatten(0, (step.batch_size, step.query_len)), {}
    return lambda: flash_attn_varlen_func(
        q, k, v, seqused_k=step.keys.lens, page_table=step.keys.page_table, softmax_scale=work.layer.scale, causal=True,
        **options,
    )  # fmt: skip


def _flashinfer(work: Workload, backend: AttentionBackend) -> Callable[[], object]:
    (wrapper,) = work.batch.plan_state.wrappers.values()
    pools = (work.cache.k(0), work.cache.v(0))
    return lambda: wrapper.run(work.q, pools)


def _flashinfer_mla(work: Workload, backend: AttentionBackend) -> Callable[[], object]:
    (wrapper,) = work.batch.plan_state.wrappers.values()
    latent, q = work.cache.k(0), work.q
    query, cache = (q[..., :512], q[..., 512:]), (latent[..., :512], latent[..., 512:])
    return lambda: wrapper.run(query=query, kv_cache=cache, return_lse=True, return_lse_base_on_e=True)


def _flashmla(work: Workload, backend: AttentionBackend) -> Callable[[], object]:
    import flash_mla

    backend.forward(work.q, None, None, work.layer, work.batch, save_kv_cache=False)  # makes the schedule
    step = work.batch.plan_state
    ((_, schedule),) = step.shared.values()
    q, cache = work.q.unsqueeze(1), work.cache.k_nhd(0)

    def call() -> object:
        return flash_mla.flash_mla_with_kvcache(
            q, cache, step.page_table, step.seq_lens, 512, schedule, softmax_scale=work.layer.scale, causal=False,
            is_fp8_kvcache=False, use_legacy=True,
        )  # fmt: skip

    return call
