"""What attn-triton is timed beside, called directly with schedules made once, as a good caller does: libraries, and the
Triton kernels of engines.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

import torch
from attn_core.bench.run import Workload
from attn_core.bench.shapes import Shape
from triton_engine_peers import sglang_triton, vllm_triton

Call = Callable[[], torch.Tensor]


def peers_of(shape: Shape, kv: str, work: Workload, names: list[str]) -> Iterator[tuple[str, Call]]:
    """(name, call) of every named library that is here and has this shape."""
    fitting = {
        "fa3": shape.kind == "mha",
        "flashinfer": shape.kind == "mha" and shape.phase == "decode",  # its prefill takes minutes to build
        "flashmla": shape.kind == "mla",
        "flashinfer_mla": shape.kind == "mla",
        "vllm-triton": shape.kind == "mha",
        "sglang-triton": True,
    }
    if kv != "auto":
        return
    makers = {
        "fa3": _fa3, "flashmla": _flashmla, "flashinfer": _flashinfer, "flashinfer_mla": _flashinfer_mla,
        "vllm-triton": vllm_triton, "sglang-triton": sglang_triton,
    }  # fmt: skip
    for name in names:
        if fitting.get(name):
            try:
                yield name, makers[name](shape, work)
            except Exception:
                print(f"PEER {name} {shape.name}: {traceback.format_exc(limit=-2)}", flush=True)


def _fa3(shape: Shape, work: Workload) -> Call:
    import flash_attn_interface as fa

    batch, k, v = work.batch, work.cache.k_nhd(0), work.cache.v_nhd(0)
    longest = max(shape.query_lens)
    options: dict[str, object] = {}
    q = work.q
    if longest == 1:
        q = q.unsqueeze(1)
        options["scheduler_metadata"] = fa.get_scheduler_metadata(
            batch.batch_size, 1, batch.page_table.shape[1] * 16, shape.num_q_heads, shape.num_kv_heads, 128,
            batch.seq_lens, qkv_dtype=torch.bfloat16, page_size=16, causal=True,
        )  # fmt: skip
    else:
        options |= {"cu_seqlens_q": batch.query_start_loc, "max_seqlen_q": longest}
    return lambda: fa.flash_attn_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=batch.seq_lens,
        page_table=batch.page_table,
        softmax_scale=work.layer.scale,
        causal=True,
        **options,
    )


def _flashmla(shape: Shape, work: Workload) -> Call:
    import flash_mla

    batch, cache, q = work.batch, work.cache.k_nhd(0), work.q.unsqueeze(1)
    schedule, _ = flash_mla.get_mla_metadata()

    def call() -> torch.Tensor:
        out: torch.Tensor = flash_mla.flash_mla_with_kvcache(
            q, cache, batch.page_table, batch.seq_lens, 512, schedule, softmax_scale=work.layer.scale, causal=False,
            is_fp8_kvcache=False, use_legacy=True,
        )[0]  # fmt: skip
        return out

    call()
    return call


def _csr(work: Workload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """indptr, page ids and lengths on the host, as FlashInfer plans with them."""
    page = work.cache.page_size
    lengths = torch.tensor(work.shape.seq_lens, dtype=torch.int32)
    counts = (lengths + page - 1) // page
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    ids = torch.tensor([p for row in work.pages for p in row], dtype=torch.int32, device="cuda")
    return indptr, ids, lengths


def _flashinfer(shape: Shape, work: Workload) -> Call:
    import flashinfer

    indptr, ids, lengths = _csr(work)
    last = (lengths - 1) % 16 + 1
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    pools = (work.cache.k(0), work.cache.v(0))
    common = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "sm_scale": work.layer.scale}
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True, backend="fa2")
    decode.plan(indptr, ids, last, shape.num_q_heads, shape.num_kv_heads, 128, 16, **common)
    return lambda: decode.run(work.q, pools)


def _flashinfer_mla(shape: Shape, work: Workload) -> Call:
    import flashinfer

    indptr, ids, lengths = _csr(work)
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(space, backend="fa3")
    starts = torch.arange(len(shape.seq_lens) + 1, dtype=torch.int32)
    wrapper.plan(
        starts,
        indptr,
        ids,
        lengths,
        shape.num_q_heads,
        512,
        64,
        64,
        False,
        work.layer.scale,
        torch.bfloat16,
        torch.bfloat16,
    )
    latent, q = work.cache.k(0), work.q
    parts = (q[..., :512], q[..., 512:], latent[..., :512], latent[..., 512:])
    return lambda: wrapper.run(*parts)
