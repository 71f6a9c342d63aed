"""A stand-in for the library's operators: its conventions in plain torch, strict about the limits it documents."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

#: Every flag of flash_attn_config, all compiled in.
FLAGS = (
    "FLASHATTENTION_DISABLE_BACKWARD", "FLASHATTENTION_DISABLE_SPLIT", "FLASHATTENTION_DISABLE_PAGEDKV",
    "FLASHATTENTION_DISABLE_APPENDKV", "FLASHATTENTION_DISABLE_LOCAL", "FLASHATTENTION_DISABLE_SOFTCAP",
    "FLASHATTENTION_DISABLE_PACKGQA", "FLASHATTENTION_DISABLE_FP16", "FLASHATTENTION_DISABLE_FP8",
    "FLASHATTENTION_DISABLE_VARLEN", "FLASHATTENTION_DISABLE_CLUSTER", "FLASHATTENTION_DISABLE_HDIM64",
    "FLASHATTENTION_DISABLE_HDIM96", "FLASHATTENTION_DISABLE_HDIM128", "FLASHATTENTION_DISABLE_HDIM192",
    "FLASHATTENTION_DISABLE_HDIM256", "FLASHATTENTION_DISABLE_SM8x", "FLASHATTENTION_ENABLE_VCOLMAJOR",
    "FLASH_ATTENTION_DISABLE_HDIMDIFF64", "FLASH_ATTENTION_DISABLE_HDIMDIFF192",
)  # fmt: skip


class FakeFlashAttention:
    """``operators.fwd`` and ``operators.get_scheduler_metadata`` with the library's arguments, masks, shapes and bases.

    ``calls`` are the keyword arguments of every forward, ``schedules`` those of every schedule.
    """

    def __init__(self) -> None:
        self.flags = dict.fromkeys(FLAGS, False)
        self.calls: list[dict[str, object]] = []
        self.schedules: list[dict[str, object]] = []
        self.varlen_calls: list[dict[str, object]] = []
        self.fail: Exception | None = None
        self.operators = SimpleNamespace(fwd=self._forward(), get_scheduler_metadata=self._schedule())

    def modules(self) -> dict[str, ModuleType]:
        """The modules to put into sys.modules."""
        interface, configuration = ModuleType("flash_attn_interface"), ModuleType("flash_attn_config")
        interface.flash_attn_3_gpu = self.operators  # type: ignore[attr-defined]
        configuration.CONFIG = {"build_flags": self.flags}  # type: ignore[attr-defined]
        package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
        cute.flash_attn_varlen_func = self._varlen()  # type: ignore[attr-defined]
        package.cute = cute  # type: ignore[attr-defined]
        return {
            "flash_attn_interface": interface,
            "flash_attn_config": configuration,
            "flash_attn": package,
            "flash_attn.cute": cute,
        }

    def _varlen(self):
        """FlashAttention 4's one function: no ``out``, windows of None, sinks counted in the log-sum-exp."""

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_k=None,
            page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
            softcap=0.0, num_splits=1, return_lse=False,
        ):  # fmt: skip
            self.varlen_calls.append(dict(locals()))
            if self.fail is not None:
                raise self.fail
            assert num_splits == 1, "SplitKV not supported on SM 9.0"
            assert page_table is None or cu_seqlens_k is None
            left, right = (-1 if edge is None else edge for edge in window_size)
            out, lse, *_ = self.operators.fwd(
                q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k, seqused_k=seqused_k, page_table=page_table, softmax_scale=softmax_scale,
                is_causal=causal, window_size_left=left, window_size_right=right, softcap=softcap, num_splits=1,
                sinks=None if learnable_sink is None else learnable_sink.bfloat16(),
            )  # fmt: skip
            if learnable_sink is not None:
                heads = (slice(None), None) if lse.dim() == 2 else (None, slice(None), None)
                lse = torch.logaddexp(lse, learnable_sink.float()[heads].expand_as(lse))
            return out, lse if return_lse else None

        return flash_attn_varlen_func

    def _forward(self):
        def fwd(
            q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=None, cu_seqlens_k=None,
            cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
            page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None,
            q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, is_causal=False, window_size_left=-1,
            window_size_right=-1, attention_chunk=0, softcap=0.0, is_rotary_interleaved=False, scheduler_metadata=None,
            num_splits=0, pack_gqa=None, sm_margin=0, sinks=None,
        ):  # fmt: skip
            arguments = dict(locals())
            arguments.pop("self", None)
            self.calls.append(arguments)
            if self.fail is not None:
                raise self.fail
            return _forward(arguments)

        return fwd

    def _schedule(self):
        def get_scheduler_metadata(
            batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype, seqused_k,
            cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None, page_size=None,
            max_seqlen_k_new=0, is_causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
            has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
        ):  # fmt: skip
            arguments = dict(locals())
            self.schedules.append(arguments)
            assert seqused_k.dtype == torch.int32
            assert seqused_k.shape == (batch_size,)
            # what the forward must be called with again, as the real schedule silently assumes
            return torch.tensor(
                [
                    batch_size,
                    max_seqlen_q,
                    max_seqlen_k,
                    int(is_causal),
                    window_size_left,
                    window_size_right,
                    num_splits,
                    int(leftpad_k is not None),
                ],
                dtype=torch.int32,
            )

        return get_scheduler_metadata


def _forward(a: dict) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    q, k, v, table = a["q"], a["k"], a["v"], a["page_table"]
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype"
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    fp8 = q.dtype == torch.float8_e4m3fn
    batch = len(a["cu_seqlens_q"]) - 1 if a["cu_seqlens_q"] is not None else q.shape[0]
    for name in ("q_descale", "k_descale", "v_descale"):
        assert fp8 == (a[name] is not None), "descales go with fp8"
        assert not fp8 or a[name].shape == (batch, k.shape[-2]), name
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dimension"
    assert q.shape[-1] % 8 == 0, "head_size should be a multiple of 8"
    assert q.shape[-1] <= 256
    assert a["q_v"] is None or (q.shape[-1] <= 64 and v.shape[-1] >= 256), "q_v is only supported for head_size <= 64"
    assert a["sinks"] is None or a["sinks"].dtype == torch.bfloat16, "sinks must have dtype bfloat16"
    varlen = a["cu_seqlens_q"] is not None
    if varlen:
        assert a["max_seqlen_q"] is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided"
        assert a["cu_seqlens_q"].dtype == torch.int32
        starts = a["cu_seqlens_q"].tolist()
        rows = [(slice(lo, hi),) for lo, hi in pairwise(starts)]
        assert max(hi - lo for lo, hi in pairwise(starts)) <= a["max_seqlen_q"]
    else:
        assert q.dim() == 4
        rows = [(b,) for b in range(q.shape[0])]
    _check_schedule(a, len(rows), varlen)
    q_v = a["q_v"]
    out = a["out"]
    if out is None:
        out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=torch.bfloat16 if fp8 else q.dtype)
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    heads = q.shape[-2]
    lse = torch.full((heads, q.shape[0]) if varlen else (q.shape[0], heads, q.shape[1]), float("nan"))
    for b, index in enumerate(rows):
        keys, values = _keys_of(a, b, table)
        if fp8:
            keys, values = (
                x * a[n][b].double()[None, :, None] for x, n in ((keys, "k_descale"), (values, "v_descale"))
            )
        queries = q[index].double() * (_by_head(a["q_descale"][b], heads) if fp8 else 1.0)
        part, part_lse = _attend(queries, None if q_v is None else q_v[index].double(), keys, values, a)
        part = part + _behind_the_end(a, b, table)
        out[index] = part.to(out.dtype)
        if varlen:
            lse[:, index[0]] = part_lse.float()
        else:
            lse[b] = part_lse.float()
    return out, lse, None, None


def _by_head(descale: Tensor, heads: int) -> Tensor:
    """[Hkv] as [1, Hq, 1]: query heads take the scale of their KV head."""
    return descale.double().repeat_interleave(heads // len(descale))[None, :, None]


def _check_schedule(a: dict, batch: int, varlen: bool) -> None:
    if a["scheduler_metadata"] is None:
        return
    q_len = a["max_seqlen_q"] if varlen else a["q"].shape[1]
    k_len = a["page_table"].shape[1] * a["k"].shape[1]
    made_for = [
        batch,
        q_len,
        k_len,
        int(a["is_causal"]),
        a["window_size_left"],
        a["window_size_right"],
        a["num_splits"],
        int(a["leftpad_k"] is not None),
    ]
    assert a["scheduler_metadata"].tolist() == made_for, (a["scheduler_metadata"].tolist(), made_for)


def _keys_of(a: dict, b: int, table: Tensor | None) -> tuple[Tensor, Tensor]:
    k, v = a["k"], a["v"]
    if table is None:
        starts = a["cu_seqlens_k"]
        assert starts.dtype == torch.int32
        own = slice(int(starts[b]), int(starts[b + 1]))
        assert own.stop - own.start <= a["max_seqlen_k"]
        return k[own].double(), v[own].double()
    assert table.dtype == torch.int32, "page_table must have dtype torch.int32"
    assert table.stride(-1) == 1, "page_table must have contiguous last dimension"
    assert a["cu_seqlens_k"] is None, "If cu_seqlens_k is passed in, then page table is not supported"
    assert a["seqused_k"].dtype == torch.int32, "seqused_k must have dtype int32"
    page = k.shape[1]
    position = torch.arange(int(a["seqused_k"][b]))
    assert len(position) <= table.shape[1] * page
    pages, offset = table[b].long()[position // page], position % page
    return k[pages, offset].double(), v[pages, offset].double()


def _behind_the_end(a: dict, b: int, table: Tensor | None) -> Tensor | float:
    """0 times the values that lie in the request's last page behind its end, where pages are loaded by whole tiles."""
    if table is None or a["leftpad_k"] is not None:
        assert a["leftpad_k"] is None or (a["leftpad_k"].dtype == torch.int32 and not a["leftpad_k"].any())
        return 0.0
    q, v, count = a["q"], a["v"], int(a["seqused_k"][b])
    queries = a["max_seqlen_q"] if a["cu_seqlens_q"] is not None else q.shape[1]
    page = v.shape[1]
    if page % 64 or queries * q.shape[-2] // v.shape[2] <= 64 or not count % page:
        return 0.0
    rest = v[int(table[b, count // page]), count % page :].double()
    return (rest.sum(0) * 0.0).repeat_interleave(q.shape[-2] // v.shape[2], 0)


def _attend(q: Tensor, q_v: Tensor | None, k: Tensor, v: Tensor, a: dict) -> tuple[Tensor, Tensor]:
    """out [S, H, Dv] and lse [H, S], natural log, -inf and 0 for rows without keys."""
    group = q.shape[1] // k.shape[1]
    s_q, s_k = q.shape[0], k.shape[0]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys)
    if q_v is not None:
        scores = scores + torch.einsum("qhd,khd->hqk", q_v, values)
    scores = scores * a["softmax_scale"]
    if a["softcap"]:
        scores = a["softcap"] * torch.tanh(scores / a["softcap"])
    position = torch.arange(s_q)[:, None] + s_k - s_q
    key = torch.arange(s_k)[None, :]
    left, right = a["window_size_left"], 0 if a["is_causal"] else a["window_size_right"]
    seen = torch.ones(s_q, s_k, dtype=torch.bool)
    if right >= 0:
        seen &= key <= position + right
    if left >= 0:
        seen &= key >= position - left
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, -1) if s_k else torch.full(scores.shape[:2], float("-inf"), dtype=torch.float64)
    total = lse
    if a["sinks"] is not None:
        total = torch.logaddexp(lse, a["sinks"].double()[:, None].expand_as(lse))
    weights = torch.where(scores == float("-inf"), 0.0, torch.exp(scores - total[..., None]))
    return torch.einsum("hqk,khd->qhd", weights, values), lse
