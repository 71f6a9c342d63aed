"""What the vendor's documents ask of a call, one rule each with its source, and the error of a call that breaks one.

Sources:
- V1, V2: docstrings of npu_fused_infer_attention_score and _v2 in the wheel of torch-npu 2.13.0 (_op_plugin_docs.py)
- OP: op-plugin, docs/zh/custom_APIs/torch_npu/ (commit 517f2e7d), newer than the wheel's docstrings
- TI: CANN ops-transformer, attention/fused_infer_attention_score/op_host (commit a093e954): what the tiling checks
- AD: docstring of _npu_paged_attention_v2 in torch_npu/op_plugin/atb/_atb_api_docs.py, wheel 2.13.0
- AO: ascend-transformer-boost, paged_attention_operation.cpp and reshape_and_cache_operation.cpp (commit ddcc8b62)
- FB: a field report: vllm-ascend issues 13699, 15503 and pull request 8508

Where V1 and V2 contradict the newer OP and TI, the newer ones are taken, and the rule's text says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Rule:
    """What must hold, and where the vendor says so."""

    text: str
    source: str


class ContractViolationError(RuntimeError):
    """A call that the chip would reject, ignore a part of, or answer wrongly. ``rule`` is a key of RULES."""

    def __init__(self, rule: str, given: str) -> None:
        self.rule = rule
        super().__init__(f"[{rule}] {given}; the contract: {RULES[rule].text} ({RULES[rule].source})")


def need(holds: bool, rule: str, given: str) -> None:
    """Raise ContractViolationError of ``rule`` unless it ``holds``."""
    if not holds:
        raise ContractViolationError(rule, given)


_FUSED: Final = {
    "dtype": Rule("query, key and value are all float16 or all bfloat16", "V2; TI CheckFeatureNoQuantDtype"),
    "contiguous": Rule("tensors are contiguous", "V2: 不支持非连续的Tensor"),
    "quantised": Rule("quantisation, padding, prefix and pse parameters are not emulated", "this emulator"),
    "layout": Rule("input_layout is BSND or TND (the others are not emulated)", "V2; this emulator"),
    "shape": Rule(
        "query, key and value have the axes of input_layout, with num_query_heads and num_key_value_heads", "V2"
    ),
    "heads": Rule("at most 256 query heads, a multiple of the key heads, at most 64 of them for each", "V2"),
    "head_dim_tokens": Rule(
        "TND without rope: heads of 128; over given keys also 192 with values of 128 or 192",
        "V2 (OP adds 64 for MHA, TI for all: not relied on); OP: V_D 192 not for pages",
    ),
    "head_dim_rows": Rule("BSND: heads of equal width, a multiple of 16, at most 512", "V2; TI CheckFeatureHeadDim"),
    "row_width": Rule("BSND with several queries: N * D is below 65535", "V2"),
    "equal_kv": Rule("key and value have the same shape (but for 192/128 over given keys)", "V2"),
    "lengths_list": Rule("lengths are lists of integers: a tensor is read from the device, element by element", "V2"),
    "lengths_needed": Rule(
        "TND takes both lengths; pages take key lengths", "V2; TI CheckFeatureActualSeqLensExistence"
    ),
    "lengths_cumulative": Rule(
        "TND: query lengths, and key lengths without pages, add up over the requests and end at T",
        "V2; TI CheckFeatureActualSeqLensQData, ...KvData",
    ),
    "lengths_count": Rule("one key length for each request, at most 4096 requests in TND", "V2"),
    "lengths_range": Rule(
        "lengths are from 0 to what the tensor or the block table holds", "TI CheckFeatureActualSeqLensKvData"
    ),
    "tokens": Rule("TND: at most 1M tokens", "V2"),
    "long_single": Rule("one query a request: at most 262144 keys", "V2, Q_S = 1"),
    "table": Rule("block_table is int32 [B, blocks], a row for each request", "V2"),
    "table_columns": Rule("block_table has a column for every block of the longest request", "V2"),
    "table_ids": Rule(
        "block ids that are read exist (the chip does not check)", "V2: 当前不会对blockid的合法性进行校验"
    ),
    "block_size": Rule(
        "block_size is that of the cache; TND: a multiple of 16 up to 1024; BSND: of 128 from 128 to 512, "
        "for single queries of 16 up to 512",
        "V2; TI CheckFeatureBlockSize",
    ),
    "cache_form": Rule("BSND and BSH read a cache [blocks, size, heads * D] only", "V2"),
    "cache_row": Rule("heads * D of such a cache is at most 65535", "V2"),
    "cache_elements": Rule("the elements of a cache tensor fit int32", "V2"),
    "mask_needed": Rule("modes 2, 3, 4 take the compressed mask", "V2; TI CheckFeatureMask"),
    "mask_form": Rule("the compressed mask is bool, int8 or uint8 [2048, 2048]: 1 above the diagonal, else 0", "V2"),
    "mode": Rule("sparse_mode is 0, 1, 2, 3 or 4; in TND 0, 3 or 4", "V2; TI CheckFAIMask"),
    "single_mode": Rule(
        "one query a request without rope, not in TND: sparse_mode, pre_tokens, next_tokens are ignored, so none may "
        "be given, and no compressed mask",
        "V2: Q_S为1且不带rope输入时该参数无效",
    ),
    "full_mask": Rule("no mask in modes 0 and 1: beyond 512 keys chips were seen to ignore it", "FB 15503"),
    "unmasked_tokens": Rule("no TND call in mode 0: chips were seen to answer with the values' average", "FB 13699"),
    "band": Rule(
        "mode 4: pre_tokens >= -q, next_tokens >= -kv, pre_tokens + next_tokens >= 0", "V2; TI CheckSparseModeParams"
    ),
    "causal_lengths": Rule(
        "mode 3: no more queries than keys (V1 and V2 want fewer in TND; OP and TI dropped that)",
        "OP, TI",
    ),
    "precise": Rule("inner_precise is 0 to 3; 0 or 1 for single queries; 0 with sinks", "V2; TI CheckFAILearnableSink"),
    "rope_pair": Rule(
        "query_rope and key_rope come together, 64 wide, with a latent of 512 (128 is not emulated)", "V2"
    ),
    "rope_heads": Rule("latent of 512: one key head; 1, 2, 4 .. 128 query heads (version 1: 32, 64, 128)", "V2; V1"),
    "rope_pages": Rule("latent of 512: in pages, block_size 16 or 128", "V2 (OP: any multiple of 16 up to 1024)"),
    "rope_layout": Rule("latent of 512: BSND or TND (version 1: BSND only)", "V2; V1"),
    "rope_queries": Rule("latent of 512: 1 to 16 queries a request", "V2 (OP dropped that)"),
    "rope_mode": Rule("latent of 512: single queries in mode 0 without a mask, several in mode 3", "V2 (OP: 0, 3, 4)"),
    "rope_value": Rule("latent of 512: value is the key's tensor", "V2; vendor tests"),
    "rope_lse": Rule("latent of 512: no LSE", "V1 and V2 name none"),
    "sink_dtype": Rule("learnable_sink is bfloat16 [N], and so are the queries", "V2; TI CheckFeatureLearnableSink"),
    "sink_layout": Rule("learnable_sink: TND only, values of at most 128", "V2"),
    "out_form": Rule(
        "`.out`: out is [attention, lse], attention contiguous and of the result's shape and dtype", "V2 .out"
    ),
    "out_lse": Rule("`.out`: no LSE (预留，暂不支持)", "V2 .out"),
}

_CACHE: Final = {
    "write_form": Rule("key, value [T, heads, D], caches [blocks, size, heads, D] of the same dtype, contiguous", "AO"),
    "write_empty": Rule("tensors are not empty", "AO"),
    "write_slots": Rule("slots are int32 [T] (aclnn: or int64)", "AO; docstring of npu_scatter_pa_kv_cache"),
    "write_range": Rule(
        "slots are below blocks * size (aclnn: and not negative)", "docstring of npu_scatter_pa_kv_cache"
    ),
    "write_twice": Rule("a slot is written once (or twice with the same bits)", "docstring of npu_scatter_pa_kv_cache"),
    "write_mode": Rule("cache_mode is Norm: the cache is ND", "docstring of npu_scatter_pa_kv_cache"),
}

_PAGED: Final = {
    "paged_dtype": Rule("query, caches and out are all float16 or all bfloat16", "AD"),
    "paged_shape": Rule("query [T, heads, D], caches [blocks, size, kv heads, D], out [T, heads, Dv]", "AD; AO"),
    "paged_heads": Rule("query heads are a multiple of the kv heads", "AD"),
    "paged_width": Rule("D is at most 256", "AD: head_size范围为（0, 256]"),
    "paged_block": Rule("the block size is a multiple of 16, at most 128", "AD"),
    "paged_table": Rule("block_table is int32 [T, blocks], with every block of the longest context", "AD"),
    "paged_ids": Rule("block ids that are read exist", "AD"),
    "paged_lengths": Rule(
        "context_lens is an int32 tensor [T] on the host, of 0 to what the table holds", "vendor tests; AD"
    ),
    "paged_latent_heads": Rule("MLA: one kv head", "AO MlaParamCheck"),
    "paged_latent_width": Rule("MLA: rows of at most 576, values not wider than rows", "AO KVCacheDimCheck910B"),
    "paged_latent_batch": Rule("MLA: at most 8192 requests", "AO MlaBatchSizeCheck"),
}

RULES: Final[Mapping[str, Rule]] = MappingProxyType({**_FUSED, **_CACHE, **_PAGED})
