"""The known traps of the libraries, on the real ones: what was found, and whether our code may rely on it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attn_core.errors import KernelError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference

KIND = LayerKind(8, 2, 128, 128, layer_ids=(0,))
#: Relative errors of bfloat16 lie below this, wrong masks and bases far above.
CLOSE = 0.01
Found = tuple[str, bool]
LATENT = LayerKind(16, 1, 576, 512, kind="mla", scale=192**-0.5, layer_ids=(0,))


def run_traps(seconds: float = 60) -> list[dict[str, Any]]:
    """Every trap in a process of its own, all at once: one that breaks the device breaks no other."""
    program = str(Path(__file__).parents[1] / "cuda_libraries.py")
    running = {
        trap.__name__: subprocess.Popen(
            [sys.executable, program, "trap", trap.__name__], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for trap in TRAPS
    }
    found, deadline = [], time.monotonic() + seconds
    for name, process in running.items():
        try:
            said, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            last = (said.strip().splitlines() or [""])[-1]
            row = json.loads(last) if last else {"found": f"died {process.returncode}: {errors[-500:]}", "right": False}
        except subprocess.TimeoutExpired:
            process.kill()
            row = {"found": f"not done in {seconds:.0f} s", "right": False}
        found.append({"trap": name, **row})
        print(f"[traps] {found[-1]}", flush=True)
    return found


def run_trap(name: str) -> dict[str, Any]:
    """What the trap of this name found, and whether it is as expected; one that raises is not."""
    try:
        text, right = next(trap for trap in TRAPS if trap.__name__ == name)()
    except Exception:
        text, right = "raised " + traceback.format_exc(limit=4), False
    return {"found": text, "right": right}


def _step(kind: LayerKind, lens: list[int], page: int, query: list[int] | None = None, cached: str = "auto"):
    torch.manual_seed(0)
    layout = "MLA" if kind.kind == "mla" else "NHD"
    config = AttentionConfig(
        layers=(kind,), page_size=page, kv_layout=layout, max_context_len=max(lens), kv_cache_dtype=cached
    )
    cache = KVCache.allocate(config, num_pages=256, device="cuda")
    for pool in (cache.k(0), cache.v(0)):
        if pool is not None:
            pool.copy_(torch.randn(pool.shape, device="cuda"))
    query = query or [1] * len(lens)
    mode = ForwardMode.DECODE if set(query) == {1} else ForwardMode.EXTEND
    first, pages = 1, []
    for n in lens:
        pages.append(list(range(first, first + -(-n // page))))
        first += -(-n // page)
    batch = ForwardBatch.build(mode, query_lens=query, seq_lens=lens, pages=pages, page_size=page, device="cuda")
    q = torch.randn(batch.num_tokens, kind.num_q_heads, kind.qk_head_dim, device="cuda", dtype=torch.bfloat16)
    return config, cache, batch, q


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-9))


def fa3_build_refuses() -> Found:
    from attn_fa3.backend import FA3Backend

    softcap = AttentionConfig(layers=(replace(KIND, softcap=30.0),))
    latent = AttentionConfig(layers=(LATENT,))
    codes = [[r.code + ":" + r.field for r in FA3Backend.build_reasons(c, "decode")] for c in (softcap, latent)]
    right = codes == [["build_unsupported:softcap"], ["build_unsupported:head_dim"]]
    return f"refusals of softcap and of MLA (qv): {codes}", right


def fa3_softcap_raises() -> Found:
    from attn_fa3.backend import FA3Backend

    config, cache, batch, q = _step(replace(KIND, softcap=5.0), [100], 16)
    backend = FA3Backend(config, cache)
    backend.init_forward_metadata(batch)
    try:
        backend.forward(q, None, None, AttentionLayer.of_kind(config.layers[0], 0), batch)
    except KernelError as error:
        return f"KernelError: {error.message}; cause {type(error.__cause__).__name__}", error.__cause__ is not None
    return "no error: the library computed something", False


def fa3_takes_sinks() -> Found:
    import flash_attn_interface as fa

    texts, right = [], True
    for lens, query in (([100, 900, 33], None), ([300, 200], [300, 77])):
        config, cache, batch, q = _step(replace(KIND, sinks=True), lens, 16, query)
        sinks = torch.randn(8, device="cuda").bfloat16()
        layer = AttentionLayer.of_kind(config.layers[0], 0, sinks=sinks)
        given, rows = q.unsqueeze(1), {}
        if query:
            given, rows = q, {"cu_seqlens_q": batch.query_start_loc, "max_seqlen_q": batch.max_query_len}
        out, lse, *_ = fa.flash_attn_with_kvcache(
            given, cache.k(0), cache.v(0), cache_seqlens=batch.seq_lens, page_table=batch.page_table, causal=True,
            return_softmax_lse=True, sinks=sinks, **rows,
        )  # fmt: skip
        wanted, with_sink = reference(q, layer, batch, cache)
        _, without = reference(q, AttentionLayer.of_kind(KIND, 0), batch, cache)
        lse = lse.t() if query else lse.squeeze(2)
        errors = _error(out.view_as(wanted), wanted), _error(lse, with_sink), _error(lse, without)
        texts.append(f"out {errors[0]:.1e}, lse with the sink {errors[1]:.1e}, without {errors[2]:.1e}")
        right &= errors[0] < CLOSE and min(errors[1:]) < CLOSE
    return "relative errors of the library's own sinks: " + "; ".join(texts), right


def fa3_empty_rows() -> Found:
    import flash_attn_interface as fa

    _, cache, batch, q = _step(KIND, [40, 16], 16)
    lens = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    out, lse, *_ = fa.flash_attn_with_kvcache(
        q.unsqueeze(1), cache.k(0), cache.v(0), cache_seqlens=lens, page_table=batch.page_table, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    found = float(out[0].abs().max()), float(lse[0].max())
    return f"output and log-sum-exp of a row without keys: {found}", found == (0.0, -math.inf)


def _flashinfer_decode(window_left: int = -1):
    import flashinfer

    _, cache, batch, q = _step(KIND, [100, 37], 16)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True, backend="fa2"
    )
    indices = torch.cat([batch.page_table[0, :7], batch.page_table[1, :3]])
    indptr, last = torch.tensor([0, 7, 10], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    wrapper.plan(
        indptr, indices, last, 8, 2, 128, 16, q_data_type=q.dtype, kv_data_type=q.dtype, window_left=window_left
    )
    return wrapper, cache, batch, q


def flashinfer_ignores_sinks() -> Found:
    wrapper, cache, _, q = _flashinfer_decode()
    pools = (cache.k(0), cache.v(0))
    same = torch.equal(wrapper.run(q, pools), wrapper.run(q, pools, sinks=torch.full((8,), 9.0, device="cuda")))
    return f"run(sinks=9) equals run(): {same}; if so they are ignored, and folded in by us", same


def flashinfer_window_keeps_one_more() -> Found:
    wrapper, cache, batch, q = _flashinfer_decode(window_left=9)
    out = wrapper.run(q, (cache.k(0), cache.v(0)))
    errors = {}
    for window in (9, 10, 11):
        layer = AttentionLayer.of_kind(replace(KIND, sliding_window=window), 0)
        errors[window] = _error(out, reference(q, layer, batch, cache)[0])
    right = errors[10] < CLOSE < min(errors[9], errors[11])
    return f"window_left=9 against windows of 9, 10, 11 keys: {errors}", right


def flashinfer_lse_is_base_2() -> Found:
    wrapper, cache, batch, q = _flashinfer_decode()
    _, lse = wrapper.run(q, (cache.k(0), cache.v(0)), return_lse=True)
    wanted = reference(q, AttentionLayer.of_kind(KIND, 0), batch, cache)[1]
    as_is, natural = _error(lse, wanted), _error(lse * math.log(2), wanted)
    return f"error of the log-sum-exp as it is {as_is:.1e}, times ln 2 {natural:.1e}", natural < CLOSE < as_is


def _flashmla(run: Callable[..., object], **options: object) -> object:
    import flash_mla

    _, cache, batch, q = _step(LATENT, [100, 64], 64)
    lens = options.pop("lens", batch.seq_lens)
    return run(
        q.unsqueeze(1), cache.k_nhd(0), block_table=batch.page_table, cache_seqlens=lens, head_dim_v=512,
        tile_scheduler_metadata=flash_mla.get_mla_metadata()[0], softmax_scale=LATENT.scale, **options,
    )  # fmt: skip


def flashmla_needs_legacy() -> Found:
    import flash_mla

    try:
        _flashmla(flash_mla.flash_mla_with_kvcache, is_fp8_kvcache=False)
    except Exception as error:
        return f"without use_legacy: {type(error).__name__}: {str(error)[:150]}", True
    return "no error without use_legacy", False


def flashmla_empty_rows() -> Found:
    import flash_mla

    lens = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    out, lse = _flashmla(flash_mla.flash_mla_with_kvcache, lens=lens, is_fp8_kvcache=False, use_legacy=True)
    found = float(out[0].float().abs().max()), float(lse[0].max())
    return f"output and log-sum-exp of a row without keys: {found}; ours maps +inf to -inf", found[1] == math.inf


def flashmla_large_queries() -> Found:
    from attn_mla.flashmla import FlashMLABackend

    config, cache, batch, q = _step(LATENT, [300, 130, 64], 64, cached="fp8_e4m3")
    backend, layer = FlashMLABackend(config, cache), AttentionLayer.of_kind(LATENT, 0)
    backend.init_forward_metadata(batch)
    q[0, 0, 0] = 1000.0
    _, lse = backend.forward(q, None, None, layer, batch, return_lse=True)
    (_, right), (_, cut) = (reference(one, layer, batch, cache) for one in (q, q.clamp(-448, 448)))
    errors = _error(lse, right), _error(lse, cut)
    q[0, 0, 0] = 1e6
    out, lse = backend.forward(q, None, None, layer, batch, return_lse=True)
    lost = out.isnan().flatten(2).any(-1).nonzero().tolist()
    others = _error(lse[1:], reference(q, layer, batch, cache)[1][1:])
    text = f"a query of 1000: error of the log-sum-exp {errors[0]:.1e}, of one cut at 448 {errors[1]:.1e}"
    found = f"one of 1e6: NaN in the rows and heads {lost}, error of the other requests {others:.1e}"
    return f"{text}; {found}", errors[0] < 0.05 < errors[1] and lost == [[0, 0]] and others < 0.02


def flashinfer_mla_on_fa2() -> Found:
    from attn_flashinfer.mla import FlashInferMLABackend

    errors = {}
    for name, lens, query in (("decode", [300, 77], None), ("prefill", [300, 77], [300, 20])):
        config, cache, batch, q = _step(LATENT, lens, 16, query)
        backend, layer = FlashInferMLABackend(config, cache), AttentionLayer.of_kind(LATENT, 0)
        backend._kernels = "fa2"  # what chips other than Hopper get
        backend.init_forward_metadata(batch)
        out, lse = backend.forward(q, None, None, layer, batch, return_lse=True)
        wanted = reference(q, layer, batch, cache)
        errors[name] = [_error(*pair) for pair in zip((out, lse), wanted, strict=True)]
    return f"errors of out and log-sum-exp: {errors}", max(map(max, errors.values())) < CLOSE


TRAPS = (
    fa3_build_refuses,
    fa3_softcap_raises,
    fa3_takes_sinks,
    fa3_empty_rows,
    flashinfer_ignores_sinks,
    flashinfer_window_keeps_one_more,
    flashinfer_lse_is_base_2,
    flashmla_needs_legacy,
    flashmla_empty_rows,
    flashmla_large_queries,
    flashinfer_mla_on_fa2,
)
