"""The emulator on its own: valid calls pass, and each rule catches a call that breaks it and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attn_ascend.emulator.rules import RULES, ContractViolationError
from attn_ascend.sight import ALL_KEYS, Sight, compressed_mask

from . import calls
from .calls import CPU, OperatorCall, floats

pytestmark = pytest.mark.usefixtures("emulated")

VALID: dict[str, Callable[[], OperatorCall]] = {
    "tokens": calls.tokens,
    "tokens, version 1": lambda: calls.tokens(version=1),
    "tokens, a window": lambda: calls.tokens().with_(**Sight(4, 15, 0).arguments(CPU)),
    "tokens, LSE": lambda: calls.tokens().with_(return_softmax_lse=True),
    "tokens, a sink": lambda: calls.tokens(dtype=torch.bfloat16).with_(learnable_sink=floats(8, dtype=torch.bfloat16)),
    "single rows": lambda: calls.rows(1),
    "single rows, version 1": lambda: calls.rows(1, version=1),
    "rows": lambda: calls.rows(4),
    "rows, LSE": lambda: calls.rows(4).with_(return_softmax_lse=True),
    "given keys": calls.given,
    "given keys, 128": lambda: calls.given(128, 128),
    "latent, single": lambda: calls.latent(1),
    "latent, several": lambda: calls.latent(4),
    "out form": lambda: calls.out_form(calls.tokens()),
    "out form, version 1": lambda: calls.out_form(calls.rows(1)),
    "paged": calls.paged,
    "paged latent": calls.paged_latent,
    "write": calls.write,
    "scatter": calls.scatter,
}

INT64 = torch.int64
UPPER = compressed_mask(CPU)
WIDE = torch.zeros(2, 1, dtype=torch.int32)


def _strided(*shape: int) -> torch.Tensor:
    return floats(*shape[:-1], 2 * shape[-1])[..., ::2]


def _huge(*shape: int) -> torch.Tensor:
    """A tensor of any size; nobody touches its memory, so it takes none."""
    return torch.empty(shape, dtype=torch.float16)


def _requests(count: int) -> OperatorCall:
    """Tokens of ``count`` requests of one query each."""
    lengths = list(range(1, count + 1))
    return calls.tokens().with_(
        query=floats(count, 8, 128), actual_seq_qlen=lengths, actual_seq_kvlen=[1] * count,
        block_table=torch.ones(count, 1, dtype=torch.int32),
    )  # fmt: skip


VIOLATIONS: list[tuple[str, str, Callable[[], OperatorCall]]] = [
    ("dtype", "float32", lambda: calls.rows(1).with_(query=torch.randn(2, 1, 8, 64))),
    ("dtype", "a cache of another dtype", lambda: calls.tokens().with_(query=floats(8, 8, 128, dtype=torch.bfloat16))),
    ("contiguous", "a strided query", lambda: calls.rows(4).with_(query=_strided(2, 4, 8, 64))),
    ("contiguous", "a strided cache", lambda: calls.tokens().with_(key=_strided(6, 128, 256))),
    ("quantised", "a dequantisation scale", lambda: calls.tokens().with_(dequant_scale_key=torch.ones(1))),
    ("layout", "BNSD", lambda: calls.rows(1).with_(input_layout="BNSD")),
    ("shape", "fewer heads than named", lambda: calls.tokens().with_(num_query_heads=16)),
    ("shape", "a cache of other heads", lambda: calls.tokens().with_(num_key_value_heads=4)),
    ("heads", "a group of 128", lambda: calls.rows(1).with_(query=floats(2, 1, 256, 64), num_query_heads=256)),
    ("heads", "heads that do not divide", lambda: calls.rows(1).with_(query=floats(2, 1, 9, 64), num_query_heads=9)),
    ("head_dim_tokens", "heads of 64 in TND", lambda: calls.tokens(64)),
    ("head_dim_tokens", "pages of 192", lambda: calls.tokens(192)),
    ("head_dim_rows", "heads of 72", lambda: calls.rows(4, 72)),
    ("head_dim_rows", "heads of 528", lambda: calls.rows(1, 528)),
    ("row_width", "128 heads of 512", lambda: calls.rows(2, 512).with_(
        query=floats(2, 2, 128, 512), num_query_heads=128)),
    ("equal_kv", "values narrower than keys", lambda: calls.tokens().with_(value=floats(6, 128, 128))),
    ("equal_kv", "other pages for values", lambda: calls.tokens().with_(value=floats(5, 128, 256))),
    ("lengths_list", "a tensor of key lengths", lambda: calls.tokens().with_(
        actual_seq_kvlen=torch.tensor([200, 130]))),
    ("lengths_needed", "TND without query lengths", lambda: calls.tokens().with_(actual_seq_qlen=None)),
    ("lengths_needed", "pages without key lengths", lambda: calls.rows(1).with_(actual_seq_kvlen=None)),
    ("lengths_cumulative", "lengths for each request", lambda: calls.tokens().with_(actual_seq_qlen=[3, 5])),
    ("lengths_cumulative", "lengths that fall", lambda: calls.tokens().with_(actual_seq_qlen=[9, 8])),
    ("lengths_cumulative", "given keys for each request", lambda: calls.given().with_(actual_seq_kvlen=[7, 13])),
    ("lengths_count", "one key length too many", lambda: calls.tokens().with_(actual_seq_kvlen=[200, 130, 1])),
    ("lengths_count", "4097 requests", lambda: _requests(4097)),
    ("lengths_range", "a negative key length", lambda: calls.rows(1).with_(actual_seq_kvlen=[200, -1])),
    ("tokens", "more than a million tokens", lambda: calls.tokens().with_(
        query=_huge((1 << 20) + 1, 8, 128), actual_seq_qlen=[1, (1 << 20) + 1])),
    ("long_single", "262145 keys of one query", lambda: calls.rows(1).with_(
        actual_seq_kvlen=[262145, 1], block_table=torch.ones(2, 2049, dtype=torch.int32))),
    ("table", "an int64 block table", lambda: calls.tokens().with_(block_table=calls.table().long())),
    ("table", "a row too few", lambda: calls.rows(1).with_(block_table=calls.table(1))),
    ("table_columns", "a column too few", lambda: calls.tokens().with_(actual_seq_kvlen=[385, 130])),
    ("table_ids", "a block that is not there", lambda: calls.rows(1).with_(block_table=calls.table() + 4)),
    ("block_size", "another block size than the cache's", lambda: calls.tokens().with_(block_size=64)),
    ("block_size", "several queries over blocks of 64", lambda: calls.rows(4).with_(
        key=floats(12, 64, 128), value=floats(12, 64, 128), block_size=64,
        block_table=torch.ones(2, 4, dtype=torch.int32))),
    ("cache_form", "a cache of four axes", lambda: calls.rows(1).with_(
        key=floats(6, 128, 2, 64), value=floats(6, 128, 2, 64))),
    ("cache_row", "rows of 65536", lambda: calls.rows(1, 256).with_(
        query=floats(2, 1, 256, 256), key=_huge(6, 128, 65536), value=_huge(6, 128, 65536),
        num_query_heads=256, num_key_value_heads=256)),
    ("cache_elements", "two to the 31 elements", lambda: calls.rows(1).with_(
        key=_huge(131072, 128, 128), value=_huge(131072, 128, 128))),
    ("mask_needed", "causal without the mask", lambda: calls.tokens().with_(atten_mask=None)),
    ("mask_form", "a float mask", lambda: calls.tokens().with_(atten_mask=UPPER.half())),
    ("mask_form", "a mask that lets the diagonal out", lambda: calls.tokens().with_(
        atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(0))),
    ("mask_form", "a mask of 1024", lambda: calls.tokens().with_(atten_mask=UPPER[:1024, :1024].contiguous())),
    ("mode", "mode 9", lambda: calls.rows(4).with_(sparse_mode=9)),
    ("mode", "left-up causal in TND", lambda: calls.tokens().with_(sparse_mode=2)),
    ("single_mode", "a window for single queries", lambda: calls.rows(1).with_(**Sight(4, 15, 0).arguments(CPU))),
    ("single_mode", "pre_tokens for single queries", lambda: calls.rows(1).with_(pre_tokens=15)),
    ("full_mask", "a full mask in mode 0", lambda: calls.rows(4).with_(
        sparse_mode=0, atten_mask=torch.zeros(1, 4, 384, dtype=torch.bool))),
    ("unmasked_tokens", "TND without a mask", lambda: calls.tokens().with_(**ALL_KEYS.arguments(CPU))),
    ("band", "a band with nothing in it", lambda: calls.tokens().with_(**Sight(4, 3, -4).arguments(CPU))),
    ("causal_lengths", "more queries than keys", lambda: calls.tokens().with_(actual_seq_kvlen=[2, 130])),
    ("precise", "row repair for single queries", lambda: calls.rows(1).with_(inner_precise=2)),
    ("rope_pair", "a rotary part alone", lambda: calls.latent(4).with_(key_rope=None)),
    ("rope_pair", "a rotary part of 32", lambda: calls.latent(4).with_(query_rope=floats(8, 4, 32))),
    ("rope_heads", "five heads", lambda: calls.latent(4).with_(
        query=floats(8, 5, 512), query_rope=floats(8, 5, 64), num_query_heads=5)),
    ("rope_heads", "four heads in version 1", lambda: calls.latent(1, version=1)),
    ("rope_layout", "tokens in version 1", lambda: calls.latent(4, heads=32, version=1)),
    ("rope_pages", "blocks of 64", lambda: calls.latent(1).with_(
        key=(cache := floats(12, 64, 512)), value=cache, key_rope=floats(12, 64, 64), block_size=64,
        block_table=torch.ones(2, 4, dtype=torch.int32))),
    ("rope_queries", "17 queries", lambda: calls.latent(17)),
    ("rope_mode", "single queries among several", lambda: calls.latent(4).with_(actual_seq_qlen=[1, 8])),
    ("rope_value", "values of their own", lambda: calls.latent(1).with_(value=floats(6, 128, 512))),
    ("rope_lse", "an LSE", lambda: calls.latent(4).with_(return_softmax_lse=True)),
    ("sink_dtype", "a float32 sink", lambda: calls.tokens(dtype=torch.bfloat16).with_(learnable_sink=torch.ones(8))),
    ("sink_dtype", "a sink for float16", lambda: calls.tokens().with_(learnable_sink=floats(8, dtype=torch.bfloat16))),
    ("sink_layout", "a sink for rows", lambda: calls.rows(4).with_(
        query=floats(2, 4, 8, 64, dtype=torch.bfloat16), key=floats(6, 128, 128, dtype=torch.bfloat16),
        value=floats(6, 128, 128, dtype=torch.bfloat16), learnable_sink=floats(8, dtype=torch.bfloat16))),
    ("out_form", "an output of another shape", lambda: calls.out_form(calls.tokens()).with_(
        out=[floats(8, 8, 64), torch.empty(1)])),
    ("out_form", "no place for the LSE", lambda: calls.out_form(calls.tokens()).with_(out=[floats(8, 8, 128)])),
    ("out_lse", "an LSE of the out form", lambda: calls.out_form(calls.tokens()).with_(return_softmax_lse=True)),
    ("write_form", "rows of another dtype", lambda: calls.write().with_(_0=torch.randn(3, 2, 64))),
    ("write_form", "strided rows", lambda: calls.write().with_(_0=_strided(3, 2, 64))),
    ("write_empty", "no rows", lambda: calls.write(0)),
    ("write_slots", "int64 slots", lambda: calls.write().with_(_4=torch.tensor([1, 2, 3]))),
    ("write_slots", "a slot too few", lambda: calls.write().with_(_4=torch.tensor([1, 2], dtype=torch.int32))),
    ("write_range", "a slot past the cache", lambda: calls.write().with_(
        _4=torch.tensor([1, 2, 768], dtype=torch.int32))),
    ("write_range", "a negative slot for aclnn", lambda: calls.scatter().with_(
        _4=torch.tensor([1, -1, 3], dtype=torch.int32))),
    ("write_twice", "a slot twice", lambda: calls.write().with_(_4=torch.tensor([7, 7, 8], dtype=torch.int32))),
    ("write_mode", "an NZ cache", lambda: calls.scatter().with_(cache_mode="PA_NZ")),
    ("paged_dtype", "float32", lambda: calls.paged().with_(_0=torch.randn(2, 8, 64))),
    ("paged_shape", "an output of another shape", lambda: calls.paged().with_(_8=floats(2, 8, 32))),
    ("paged_shape", "a strided cache", lambda: calls.paged().with_(_1=_strided(6, 128, 2, 64))),
    ("paged_heads", "heads that do not divide", lambda: calls.paged().with_(
        _0=floats(2, 9, 64), _4=9, _8=floats(2, 9, 64))),
    ("paged_width", "heads of 272", lambda: calls.paged(272)),
    ("paged_block", "blocks of 256", lambda: calls.paged().with_(_1=floats(3, 256, 2, 64), _2=floats(3, 256, 2, 64))),
    ("paged_table", "a row too few", lambda: calls.paged().with_(_6=calls.table(1))),
    ("paged_table", "a column too few", lambda: calls.paged().with_(_7=torch.tensor([385, 1], dtype=torch.int32))),
    ("paged_ids", "a block that is not there", lambda: calls.paged().with_(_6=calls.table() + 4)),
    ("paged_lengths", "int64 lengths", lambda: calls.paged().with_(_7=torch.tensor([200, 130]))),
    ("paged_lengths", "a negative length", lambda: calls.paged().with_(_7=torch.tensor([-1, 1], dtype=torch.int32))),
    ("paged_latent_heads", "two kv heads", lambda: calls.paged_latent().with_(_2=2)),
    ("paged_latent_width", "rows of 640", lambda: calls.paged_latent().with_(
        _0=floats(2, 5, 640), _1=floats(6, 128, 1, 640))),
    ("paged_latent_batch", "8193 requests", lambda: calls.paged_latent().with_(
        _0=_huge(8193, 1, 576), _3=1, _8=_huge(8193, 1, 512))),
]  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_a_valid_call_passes(name: str) -> None:
    VALID[name]().run()


@pytest.mark.parametrize(("rule", "what", "call"), VIOLATIONS, ids=[f"{rule}: {what}" for rule, what, _ in VIOLATIONS])
def test_a_violation_is_caught_by_its_rule(rule: str, what: str, call: Callable[[], OperatorCall]) -> None:
    with pytest.raises(ContractViolationError) as caught:
        call().run()
    assert caught.value.rule == rule
    assert RULES[rule].source in str(caught.value)


def test_every_rule_has_a_violation_that_it_catches() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == set(RULES)


def test_a_mask_changed_in_place_is_looked_at_again() -> None:
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    calls.tokens().with_(atten_mask=mask).run()
    mask[5, 3] = True
    with pytest.raises(ContractViolationError, match="mask_form"):
        calls.tokens().with_(atten_mask=mask).run()
