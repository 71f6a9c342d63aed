"""A stand-in for flashinfer's wrappers: their conventions in plain torch, strict about the limits they have.

Kept from the real ones: log-sum-exp in base 2; window_left w keeps w + 1 keys; ``sinks=`` ignored; plan on the host,
buffers on the device; packed masks with starts in bytes at run time, but computed in bits by plan(); fa3 without masks;
planned dtypes, shapes and log-sum-exp modes checked at run time; MLA causal tiles that end inside a token refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FA3_WIDTHS = ((64, 64), (128, 128), (256, 256), (192, 128))


class FakeFlashInfer:
    """``plans``: (wrapper class, keyword arguments) of each plan; ``runs``: likewise; ``made``: wrappers;
    ``table_plans``: the wrappers whose compiled planner ran, through the wrapper or past it."""

    def __init__(self) -> None:
        self.plans: list[tuple[str, dict[str, Any]]] = []
        self.runs: list[tuple[str, dict[str, Any]]] = []
        self.made: list[Any] = []
        self.table_plans: list[Any] = []
        self._toolkit = TemporaryDirectory()
        self.cuda_path = self._toolkit.name
        (Path(self.cuda_path) / "bin").mkdir()
        (Path(self.cuda_path) / "bin" / "nvcc").touch()
        self.built: list[tuple[Any, ...]] = []
        self.shipped: list[tuple[Any, ...]] = []
        self.layout = 0  #: what the planners lay their tables out by, beside the sizes
        self.fail: Exception | None = None

    def modules(self) -> dict[str, ModuleType]:
        """The modules to put into sys.modules."""
        decode, prefill, mla = (ModuleType(f"flashinfer.{name}") for name in ("decode", "prefill", "mla"))
        decode.BatchDecodeWithPagedKVCacheWrapper = self._bound(Decode)
        prefill.BatchPrefillWithPagedKVCacheWrapper = self._bound(Prefill)
        prefill.BatchPrefillWithRaggedKVCacheWrapper = self._bound(Ragged)
        mla.BatchMLAPagedAttentionWrapper = self._bound(MLA)
        mla.MLAPlanMetadata = Metadata
        flashinfer = ModuleType("flashinfer")
        flashinfer.decode, flashinfer.prefill, flashinfer.mla = decode, prefill, mla
        found = {"flashinfer": flashinfer}
        for name in ("jit", "jit.attention", "jit.attention.modules", "jit.cpp_ext"):
            found[f"flashinfer.{name}"] = ModuleType(f"flashinfer.{name}")
        made = found["flashinfer.jit.attention.modules"]
        made.gen_batch_mla_module = self._spec
        made._gen_batch_prefill_primary_module = made.gen_batch_prefill_module = self._spec
        found["flashinfer.jit.cpp_ext"].get_cuda_path = lambda: self.cuda_path
        return found | {f"flashinfer.{name}": getattr(flashinfer, name) for name in ("decode", "prefill", "mla")}

    def _spec(self, *arguments):
        """A module that is there if its arguments are in ``built`` (compiled here) or ``shipped``."""
        shipped = arguments in self.shipped
        return SimpleNamespace(is_aot=shipped, is_compiled=shipped or arguments in self.built)

    def _bound(self, cls):
        owner = self

        class Bound(cls):
            log = owner

            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                owner.made.append(self)

        Bound.__name__ = cls.__name__
        return Bound


@dataclass(frozen=True)
class Metadata:
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    kv_len_arr: Tensor

    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


class Wrapper:
    log: FakeFlashInfer

    def _start(self, float_workspace_buffer, kv_layout, use_cuda_graph, backend):
        assert backend in ("fa2", "fa3"), "name the kernels"
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self._float_workspace_buffer = float_workspace_buffer
        self._kv_layout, self._use_cuda_graph, self._backend = kv_layout, use_cuda_graph, backend
        self._int_workspace_buffer = torch.empty(8, dtype=torch.uint8)
        self._pin_memory_int_workspace_buffer = torch.empty(8, dtype=torch.uint8)
        self._rows: list[int] | None = None
        self._max_rows: int | None = None

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        self._float_workspace_buffer, self._int_workspace_buffer = float_workspace_buffer, int_workspace_buffer
        self._pin_memory_int_workspace_buffer = torch.empty_like(int_workspace_buffer)

    def _note(self, list_name, arguments):
        getattr(self.log, list_name).append((type(self).__name__, arguments))
        if self.log.fail is not None:
            raise self.log.fail


class Paged(Wrapper):
    """What the paged wrappers share once their plan is stored."""

    def _store(self, qo_indptr, indptr, indices, last_page_len, a):
        for tensor in (qo_indptr, indptr, last_page_len):
            assert tensor.device.type == "cpu", "a device tensor would be read back"
            assert tensor.dtype == torch.int32
        if self._use_cuda_graph:
            assert len(last_page_len) == len(self._last_buf), "The batch size should be fixed in cudagraph mode"
            assert len(indices) <= len(self._indices_buf)
            self._indptr_buf.copy_(indptr)
            self._last_buf.copy_(last_page_len)
            self._indices_buf[: len(indices)] = indices
            self._max_rows = self._max_rows or int(qo_indptr[-1])
            assert int(qo_indptr[-1]) <= self._max_rows
        else:
            self._indptr_buf, self._indices_buf, self._last_buf = indptr.clone(), indices, last_page_len.clone()
        self._plan_host(qo_indptr, indptr, last_page_len, a)

    def _plan_host(self, qo_indptr, indptr, last_page_len, a):
        """As the wrappers do: the compiled module writes tables into the integer workspace, which may be shared."""
        self._plan = a
        self._cached_module = SimpleNamespace(plan=self._plan_tables)
        pages = torch.diff(indptr)
        lens = (pages - 1).clamp(min=0) * a["page_size"] + last_page_len
        window = -1 if a["window_left"] is None else a["window_left"]
        head_dim = a.get("head_dim") or a.get("head_dim_qk")
        sizes = (
            int(qo_indptr[-1]), len(lens), a["num_qo_heads"], a["num_kv_heads"], a["page_size"], self._use_cuda_graph,
            head_dim, a.get("head_dim_vo") or head_dim, a["causal"], window,
        )  # fmt: skip
        more = (-1, bool(a.get("disable_split_kv")), 0, 0) if self._backend == "fa2" else ()
        workspaces = (
            self._float_workspace_buffer,
            self._int_workspace_buffer,
            self._pin_memory_int_workspace_buffer,
        )
        self._plan_info = self._plan_tables(*workspaces, qo_indptr, indptr, lens, *sizes, *more)

    def _plan_tables(
        self, float_ws, int_ws, pinned, qo_indptr, kv_indptr, kv_lens, rows, batch, num_qo_heads, num_kv_heads,
        page_size, in_graph, head_dim_qk, head_dim_vo, causal, window_left, *of_fa2,
    ):  # fmt: skip
        a = self._plan
        self.log.table_plans.append(self)
        assert len(of_fa2) == (4 if self._backend == "fa2" else 0), "fa2 takes four more arguments"
        assert (rows, batch) == (int(qo_indptr[-1]), len(kv_lens))
        assert (num_qo_heads, num_kv_heads, page_size) == (a["num_qo_heads"], a["num_kv_heads"], a["page_size"])
        assert (in_graph, causal, window_left) == (self._use_cuda_graph, a["causal"], a["window_left"])
        assert head_dim_qk == head_dim_vo == (a.get("head_dim") or a.get("head_dim_qk"))
        assert torch.equal(torch.diff(kv_indptr), -(-kv_lens // page_size)), "the lengths are not those of the pages"
        if of_fa2 and of_fa2[3]:
            assert (torch.diff(qo_indptr) == of_fa2[3]).all(), "uniform_q_len promises more than the batch keeps"
        assert pinned.numel() >= int_ws.numel()
        int_ws.tables = (qo_indptr.clone(), kv_indptr.clone(), kv_lens.clone())
        return [rows, batch, self.log.layout, *of_fa2]

    def _attend(self, q, paged_kv_cache, out, return_lse, k_scale, v_scale, mask):
        a = self._plan
        k_cache, v_cache = paged_kv_cache
        assert q.dtype == a["q_data_type"], "planned query dtype"
        assert k_cache.dtype == v_cache.dtype == (a["kv_data_type"] or a["q_data_type"]), "planned cache dtype"
        if self._kv_layout == "HND":
            k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        assert k_cache.shape[1] == a["page_size"]
        assert k_cache.stride() == v_cache.stride(), "another module would be built for unequal strides"
        qo_host, kv_host, lens = self._int_workspace_buffer.tables
        assert q.shape[0] == int(qo_host[-1]), "q.shape[0] does not match qo_indptr[-1]"
        assert torch.equal(self._indptr_buf, kv_host), "the plan is for other pages than the buffers hold"
        last = lens - (torch.diff(kv_host) - 1).clamp(min=0) * a["page_size"]
        assert torch.equal(self._last_buf, last)
        if self._use_cuda_graph and self._backend == "fa2":
            assert self._plan_info[4] is False, "keys that are never split"
        if out is None:
            out = torch.full((*q.shape[:2], v_cache.shape[-1]), float("nan"), dtype=q.dtype)
        assert out.is_contiguous(), "the kernels write rows one after the other"
        lse = torch.full(q.shape[:2], float("nan"))
        for b in range(len(self._last_buf)):
            rows = slice(int(qo_host[b]), int(qo_host[b + 1]))
            pages = self._indices_buf[int(self._indptr_buf[b]) : int(self._indptr_buf[b + 1])].long()
            count = 0 if not len(pages) else (len(pages) - 1) * a["page_size"] + int(self._last_buf[b])
            k = k_cache[pages].flatten(0, 1)[:count].double()
            v = v_cache[pages].flatten(0, 1)[:count].double()
            bits = None if mask is None else mask(b, rows.stop - rows.start, count)
            part, part_lse = attend(q[rows].double(), k, v, a, bits, k_scale)
            out[rows], lse[rows] = (part * v_scale).to(out.dtype), part_lse.float()
        return (out, lse) if return_lse else out


class Decode(Paged):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto",
        jit_args=None,
    ):  # fmt: skip
        self._start(float_workspace_buffer, kv_layout, use_cuda_graph, backend)
        assert use_tensor_cores
        self._indptr_buf, self._indices_buf = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self._last_buf = paged_kv_last_page_len_buffer

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, window_left=-1,
        logits_soft_cap=None, q_data_type="float16", kv_data_type=None, sm_scale=None, disable_split_kv=False,
    ):  # fmt: skip
        a = dict(locals())
        self._note("plans", a)
        self._store(
            torch.arange(len(last_page_len) + 1, dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            a | {"causal": False},
        )

    def run(self, q, paged_kv_cache, *, k_scale=None, v_scale=None, out=None, return_lse=False, sinks=None):
        self._note("runs", dict(locals()))
        return self._attend(q, paged_kv_cache, out, return_lse, k_scale or 1.0, v_scale or 1.0, None)


class Prefill(Paged):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None, variant_owns_mask=False,
    ):  # fmt: skip
        self._start(float_workspace_buffer, kv_layout, use_cuda_graph, backend)
        self._indptr_buf, self._indices_buf = paged_kv_indptr_buf, paged_kv_indices_buf
        self._last_buf, self._custom_mask_buf = paged_kv_last_page_len_buf, custom_mask_buf
        self._mask_indptr_buf = mask_indptr_buf
        if use_cuda_graph:
            assert len(qo_indptr_buf) - 1 == len(paged_kv_last_page_len_buf)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
        disable_split_kv=False,
    ):  # fmt: skip
        a = dict(locals())
        self._note("plans", a)
        if self._backend == "fa3":
            assert packed_custom_mask is None, "fa3 has no masks"
            assert (head_dim_qk, head_dim_vo or head_dim_qk) in FA3_WIDTHS
            assert kv_data_type in (None, q_data_type), "fa3 reads fp8 only with fp8 queries"
        if not self._use_cuda_graph:
            self._custom_mask_buf = packed_custom_mask
            lens = torch.diff(paged_kv_indptr).sub(1).clamp(min=0) * page_size + paged_kv_last_page_len
            in_bits = torch.cumsum(torch.diff(qo_indptr) * lens, 0)
            self._mask_indptr_buf = (
                torch.cat([torch.zeros(1), in_bits]).int() if packed_custom_mask is not None else None
            )
        self._store(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, a)

    def run(
        self, q, paged_kv_cache, *, k_scale=None, v_scale=None, out=None, return_lse=False, lse_base="log2", sinks=None
    ):
        self._note("runs", dict(locals()))
        mask = self._bits if self._custom_mask_buf is not None else None
        return self._attend(q, paged_kv_cache, out, return_lse, k_scale or 1.0, v_scale or 1.0, mask)

    def _bits(self, b, n, m):
        place = torch.arange(n * m)
        packed = self._custom_mask_buf[int(self._mask_indptr_buf[b]) + place // 8]
        return ((packed >> (place % 8)) & 1).bool().view(n, m)


class Ragged(Wrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"):
        self._start(float_workspace_buffer, kv_layout, use_cuda_graph, backend)

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, causal=False,
        window_left=-1, logits_soft_cap=None, sm_scale=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        self._note("plans", dict(locals()))
        self._plan = dict(locals())

    def run(self, q, k, v, *, out=None, return_lse=False):
        a = self._plan
        self._note("runs", dict(locals()))
        assert q.shape[-1] == a["head_dim_qk"]
        assert v.shape[-1] == a["head_dim_vo"]
        assert q.dtype == a["q_data_type"]
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype) if out is None else out
        lse = torch.empty(q.shape[:2])
        for b in range(len(a["qo_indptr"]) - 1):
            rows = slice(int(a["qo_indptr"][b]), int(a["qo_indptr"][b + 1]))
            keys = slice(int(a["kv_indptr"][b]), int(a["kv_indptr"][b + 1]))
            part, part_lse = attend(q[rows].double(), k[keys].double(), v[keys].double(), a, None, 1.0)
            out[rows], lse[rows] = part.to(out.dtype), part_lse.float()
        return (out, lse) if return_lse else out


class MLA(Wrapper):
    def __init__(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
        kv_len_arr=None, backend="auto",
    ):  # fmt: skip
        self._start(float_workspace_buffer, "", use_cuda_graph, backend)
        self._indices_buf = kv_indices
        self._planned_backend = None

    def plan(
        self, *, metadata, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type,
        kv_data_type, query_layout="packed", kv_cache_layout="packed", lse_mode="none",
    ):  # fmt: skip
        a = dict(locals())
        self._note("plans", a)
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        assert query_layout == kv_cache_layout == "split"
        self._plan = a
        if not self._use_cuda_graph:
            self._indices_buf = metadata.kv_indices
        wrapper = self

        def plan(float_ws, int_ws, pinned, qo_indptr, kv_indptr, kv_len_arr, heads, head_dim_v, is_causal):
            assert heads == num_heads
            if is_causal and 64 % heads and heads != 128:
                raise ValueError("MLA causal tile boundary is unsupported")
            # what the planner writes, page-locked; whoever called copies it to the integer workspace, which another
            # wrapper may share and overwrite
            values = torch.cat([qo_indptr, kv_indptr, kv_len_arr]).view(torch.uint8)
            pinned[: len(values)] = values
            return [heads, head_dim_v], len(values)

        def plan_and_copy(float_ws, int_ws, pinned, *rest):
            layout, size = plan(float_ws, int_ws, pinned, *rest)
            int_ws[:size] = pinned[:size]
            return layout

        made = SimpleNamespace(
            _cached_module=SimpleNamespace(plan=plan_and_copy, _module=SimpleNamespace(plan=plan)),
            _float_workspace_buffer=self._float_workspace_buffer,
            _int_workspace_buffer=torch.empty(1 << 12, dtype=torch.uint8),
            _pin_memory_int_workspace_buffer=torch.empty(1 << 12, dtype=torch.uint8),
            _causal=causal,
        )
        m = metadata
        made._plan_info = plan_and_copy(
            None,
            made._int_workspace_buffer,
            made._pin_memory_int_workspace_buffer,
            m.qo_indptr,
            m.kv_indptr,
            m.kv_len_arr,
            num_heads,
            head_dim_ckv,
            causal,
        )
        wrapper._planned_backend = made

    def run(
        self, *, query, kv_cache, out=None, return_lse=False, return_lse_base_on_e=False, ckv_scale=None, kpe_scale=None
    ):
        a = self._plan
        self._note("runs", dict(locals()))
        asked = ("basee" if return_lse_base_on_e else "base2") if return_lse else "none"
        assert asked == a["lse_mode"], "LSE mode"
        fp8 = a["kv_data_type"] == torch.float8_e4m3fn
        assert fp8 == (ckv_scale is not None) == (kpe_scale is not None)
        (q_nope, q_pe), (ckv, kpe) = query, kv_cache
        assert q_nope.shape[1] == a["num_heads"]
        b = len(a["metadata"].kv_len_arr)
        tables = self._planned_backend._int_workspace_buffer[: 4 * (3 * b + 2)].view(torch.int32)
        qo_indptr, kv_indptr, lens = tables.split([b + 1, b + 1, b])
        out = torch.empty_like(q_nope) if out is None else out
        lse = torch.empty(q_nope.shape[:2])
        for b in range(len(lens)):
            rows = slice(int(qo_indptr[b]), int(qo_indptr[b + 1]))
            pages = self._indices_buf[int(kv_indptr[b]) : int(kv_indptr[b + 1])].long()
            latent = ckv[pages].flatten(0, 1)[: int(lens[b])].double() * (ckv_scale or 1.0)
            rope = kpe[pages].flatten(0, 1)[: int(lens[b])].double() * (kpe_scale or 1.0)
            q = torch.cat([q_nope[rows], q_pe[rows]], -1).double()
            k = torch.cat([latent, rope], -1)[:, None]
            options = {"causal": a["causal"], "sm_scale": a["sm_scale"], "window_left": -1, "logits_soft_cap": 0.0}
            part, part_lse = attend(q, k, latent[:, None], options, None, 1.0)
            out[rows], lse[rows] = part.to(out.dtype), (part_lse * math.log(2)).float()
        return (out, lse) if return_lse else out


def attend(q, k, v, a, bits, k_scale):
    """out [n, H, Dv] and lse [n, H] in base 2."""
    n, m = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * a["sm_scale"] * k_scale
    if a["logits_soft_cap"]:
        scores = a["logits_soft_cap"] * torch.tanh(scores / a["logits_soft_cap"])
    place, key = torch.arange(n)[:, None], torch.arange(m)[None, :]
    seen = torch.ones(n, m, dtype=torch.bool)
    if bits is not None:
        assert a["window_left"] == -1
        seen = bits
    elif a["causal"]:
        seen = key + n <= m + place
    if a["window_left"] >= 0:
        seen = seen & (key + n + a["window_left"] >= m + place)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, -1) if m else torch.full(scores.shape[:2], float("-inf"), dtype=torch.float64)
    weights = torch.where(scores == float("-inf"), 0.0, torch.exp(scores - lse[..., None]))
    out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
    return out, lse.T / math.log(2)
